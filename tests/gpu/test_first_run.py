"""The scripts for a first run on a GPU, dry on a CPU, so that a changed name or signature is seen without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "first_run"
INSIDE = re.compile(r"^\s*(?:from|import) (dsc_serve\.\w[\w.]*|dsc_kernels[\w.]*)", re.MULTILINE)
ENDS = {  # part: what its log ends with
    "machine": "native",
    "golden": "golden: OK",
    "graphs": "graphs: OK",
    "decode": "decode: measured",
    "layers": "layers: measured",
    "tune": "tune: measured",
    "memcheck": "sanitize: all ran",
    "http": "http: OK",
    "launches": "dense decode:",
}

pytest.importorskip("triton", reason="Triton is not installed")


def plan(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DRY": "1", "OUT": str(out), "PY": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(FOLDER / "plan.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)


LONG = {"http"}  # whose parts have tests of their own


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in LONG else name for name in ENDS]
)
def test_a_part_runs_dry(name: str, tmp_path: Path) -> None:
    done = plan(tmp_path, "C", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ENDS[name] in done.stdout and f"{name} rc=0" in done.stdout
    if name in ("decode", "layers", "tune"):
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))


def test_a_part_that_fails_or_is_unknown_is_told(tmp_path: Path) -> None:
    broken = plan(tmp_path, "C", "nothing")
    assert broken.returncode == 1 and "nothing is not a part of the plan" in broken.stdout


def test_every_part_of_the_plan_that_a_cpu_can_run_is_run_here() -> None:
    text = (FOLDER / "plan.sh").read_text(encoding="utf-8")
    (cases,) = re.findall(r"^one\(\) \{\n  case \$1 in\n(.*?)^  esac", text, re.MULTILINE | re.DOTALL)
    named = {
        name.strip() for names in re.findall(r"^    ([\w| ]+)\) part", cases, re.MULTILINE) for name in names.split("|")
    }
    on_a_device = {"tests", "compare", "layer"}  # which run commands of the package that tests of their own run
    assert named - on_a_device - {"racecheck"} == set(ENDS)


def test_what_the_scripts_use_from_inside_stands_in_one_file() -> None:
    used = {file.name for file in FOLDER.glob("*.py") if INSIDE.search(file.read_text(encoding="utf-8"))}
    assert used == {"internals.py"}


@pytest.mark.full
def test_the_expected_texts_are_what_plain_torch_says() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        import expected
    finally:
        sys.path.remove(str(FOLDER))
    assert json.loads(expected.FILE.read_text(encoding="utf-8")) == expected.texts()
