"""What GPU machines come with may be installed: torch 2.11 with triton 3.6, as torch 2.13 with triton 3.7."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dsc_kernels import aot

REPO = Path(__file__).parents[2]
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


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_keep_their_shape_with_triton_3_6(tmp_path: Path) -> None:
    """Imports, and on sm_90 no spills, wide loads, warpgroups and copies in flight; registers move between versions."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"triton 3.6.0 cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    rows_file = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import triton; assert triton.__version__ == '3.6.0'; from dsc_kernels.gpu import layers; "
    code += f"from dsc_kernels import aot; aot.aot_command(['--target', 'sm_90', '--json', {str(rows_file)!r}])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[aot.Row] = json.loads(rows_file.read_text(encoding="utf-8"))
    budgets = {(b["kernel"], b["config"], b["target"]): b for b in json.loads(aot.BUDGETS.read_text(encoding="utf-8"))}
    assert len(rows) == len([key for key in budgets if key[2] == "sm_90"])
    for row in rows:
        # what this version needs of registers and shared memory is its own; the rest is what the kernels are made for
        allowed = {**budgets[row["kernel"], row["config"], row["target"]], "registers": 255, "shared_bytes": 227 << 10}
        assert aot.broken_budgets([row], [allowed]) == []  # type: ignore[list-item]
