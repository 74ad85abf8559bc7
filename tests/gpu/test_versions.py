"""What GPU machines come with may be installed: torch 2.11 with triton 3.6, as torch 2.13 with triton 3.7."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dsc_kernels import aot

REPO = Path(__file__).parents[2]
PYTHON = "DSC_TRITON_3_6_PYTHON"  # names a Python of such an environment
HOW = (
    "python3 -m venv /tmp/triton36 && /tmp/triton36/bin/pip install torch==2.11.0 triton==3.6.0 'numpy<2.4' click && "
    f"{PYTHON}=/tmp/triton36/bin/python .venv/bin/pytest tests/gpu/test_versions.py"
)
PAIRS = [("2.11.0", "3.6.0"), ("2.13.0", "3.7.1")]


def required(requirements: list[str], name: str) -> Requirement:
    (found,) = (one for one in map(Requirement, requirements) if one.name == name)
    return found


@pytest.mark.parametrize(("torch", "triton"), PAIRS)
def test_the_pins_allow_what_fits_each_other(torch: str, triton: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert torch in required(project["dependencies"], "torch").specifier
    assert triton in required(project["optional-dependencies"]["gpu"], "triton").specifier
    for other in ("2.10.0", "2.14.0"):
        assert other not in required(project["dependencies"], "torch").specifier


@pytest.fixture
def older_python() -> str:
    """A Python that has torch 2.11 and triton 3.6."""
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"no environment with torch 2.11 and triton 3.6 is named; to make one and run this: {HOW}")
    return python


def run(python: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["PYTHONPATH"] = str(REPO / "kernels")
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_is_imported_with_torch_2_11_and_triton_3_6(older_python: str) -> None:
    modules = [f"dsc_kernels.gpu.{file.stem}" for file in (REPO / "kernels/dsc_kernels/gpu").glob("[!_]*.py")]
    code = f"import importlib, torch, triton; [importlib.import_module(name) for name in {modules}]; "
    code += "print(torch.__version__, triton.__version__)"
    torch, triton = run(older_python, "-c", code).split()
    assert torch.startswith("2.11.") and triton.startswith("3.6.")
    assert len(modules) > 15


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", ["paper", pytest.param("large", marks=pytest.mark.full)])
def test_kernels_keep_their_shape_with_triton_3_6(config: str, older_python: str, tmp_path: Path) -> None:
    """On sm_90 no spills, wide loads, warpgroups and copies in flight; registers move between versions."""
    file = tmp_path / "rows.json"
    options = ("--config", config, "--target", "sm_90", "--json", str(file))
    run(older_python, "-m", "dsc_kernels.aot", *options)
    rows: list[aot.BudgetRow] = json.loads(file.read_text(encoding="utf-8"))
    budgets = {(b["kernel"], b["config"], b["target"]): b for b in json.loads(aot.BUDGETS.read_text(encoding="utf-8"))}
    assert len(rows) == len([key for key in budgets if key[1:] == (config, "sm_90")])
    for row in rows:
        # what this version needs of registers and shared memory is its own; the rest is what the kernels are made for
        allowed = {**budgets[row["kernel"], row["config"], row["target"]], "registers": 255, "shared_bytes": 227 << 10}
        assert aot.broken_budgets([row], [allowed]) == []  # type: ignore[list-item]
