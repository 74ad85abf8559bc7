"""Every C++ header compiles by itself, with the flags that an editor takes from the folder's compile_flags.txt."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels/dsc_kernels"
HEADERS = sorted(FOLDER.glob("*/*.h"))
PYTHON = Path(sysconfig.get_path("include"))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def test_there_are_headers() -> None:
    assert {header.parent.name for header in HEADERS} == {"bindings", "cpu"}


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: f"{header.parent.name}/{header.name}")
@pytest.mark.parametrize("level", ["", "x86-64-v3"])
def test_a_header_compiles_alone(header: Path, level: str) -> None:
    """Vectors of sixteen are others where the processor has none (`wide.h`)."""
    if level and header.parent.name != "cpu":
        pytest.skip("knows no vectors")
    flags = (header.parent / "compile_flags.txt").read_text().split()
    if level:
        flags = [*(flag for flag in flags if not flag.startswith("-m")), f"-march={level}"]
    if header.parent.name == "bindings":
        if not (PYTHON / "Python.h").exists():
            pytest.skip("no headers of Python here")
        flags += ["-isystem", str(PYTHON)]
    command = ["g++", *flags, "-fsyntax-only", header.name]
    done = subprocess.run(command, cwd=header.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
