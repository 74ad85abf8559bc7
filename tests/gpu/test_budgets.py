"""Kernels compiled for GPUs that need not be here keep to the resources that are written down.

Compiling takes a process of its own: Triton decides once whether to compile or to interpret. After a change that moves
the figures on purpose: `python tests/gpu/write_budgets.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_kernels import aot, machine_code

triton = pytest.importorskip("triton", reason="Triton is not installed")


def compiled(tmp_path: Path, *options: str) -> list[aot.BudgetRow]:
    file = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dsc_kernels.aot", "--json", str(file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[aot.BudgetRow] = json.loads(file.read_text())
    return rows


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["of_products", "of_moe", "of_routing", "of_attention", "of_composition"])
def test_variants_compile_and_fit_the_targets(family: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_variants.py"), family]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def budgets() -> list[aot.BudgetRow]:
    rows: list[aot.BudgetRow] = json.loads(aot.BUDGETS.read_text())
    return rows


def test_kernels_keep_their_budgets(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--config", "paper", "--target", "sm_90")
    assert rows and aot.broken_budgets(rows, budgets()) == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_keep_their_budgets_everywhere(tmp_path: Path) -> None:
    rows = compiled(tmp_path)
    assert aot.broken_budgets(rows, budgets()) == []
    assert len(rows) == len(budgets()), "budgets.json has rows of kernels that are gone"


def test_every_kernel_configuration_and_target_has_a_budget() -> None:
    rows = budgets()
    keys = {(row["kernel"], row["config"], row["target"]) for row in rows}
    kernels = {row["kernel"] for row in rows}
    assert keys == {(k, c, t) for k in kernels for c in aot.CONFIGS for t in aot.TARGETS}
    assert all(list(row) == list(aot.BudgetRow.__annotations__) for row in rows)


def test_every_kernel_that_is_launched_is_compiled_for_every_configuration() -> None:
    """A kernel that is launched tells its grid in its docstring; the others are parts of those."""
    from dsc_kernels.gpu import compiler

    if compiler.interpreted():
        pytest.skip("kernels are interpreted here")
    folder = Path(compiler.__file__).parent
    modules = [importlib.import_module(f"dsc_kernels.gpu.{file.stem}") for file in folder.glob("*.py")]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)}
    launched = {function.__name__ for function in found if "grid (" in (function.fn.__doc__ or "")}
    assert {"route_and_raise", "select_compose_tokens", "attend"} < launched
    for config in aot.CONFIGS:
        jobs = aot.jobs(config)
        assert {job.function.__name__ for job in jobs} == launched
        assert {job.name for job in jobs} == {row["kernel"] for row in budgets() if row["config"] == config}


def test_shared_memory_fits_the_targets() -> None:
    most = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
    assert [row for row in budgets() if row["shared_bytes"] > most[row["target"]]] == []


def of(*names: str) -> list[aot.BudgetRow]:
    """What these kernels are held to on sm_90, in every configuration."""
    found = [row for row in budgets() if row["kernel"] in names and row["target"] == "sm_90"]
    assert len(found) == len(names) * len(aot.CONFIGS)
    return found


def test_products_of_more_than_a_few_tokens_are_warpgroups_and_nothing_is_shuffled_between() -> None:
    rows = of("route.few", "route.many", "route_and_raise.few", "compose_beside.few", "multiply.few", "project.few")
    assert all(row["warpgroup_instructions"] == row["matrix_instructions"] > 0 for row in rows)
    assert all(row["loop_shuffles"] == 0 for row in [*rows, *of("route.one", "multiply.one", "project.one")])


def test_copies_are_on_their_way_while_a_step_is_computed_with() -> None:
    assert all(row["copies_in_flight"] >= 2 for row in of("attend", "route.one", "multiply.one", "project.one"))


def test_rows_are_scored_again_by_the_instructions_that_score_them_all() -> None:
    """So that a logit is the same number either way: sums in the order of these instructions, a tile's and a row's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_rescored.py"), "sm_80", "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for target, found in json.loads(done.stdout).items():
        assert len(found) == 24
        for case, (exact, again) in found.items():
            assert len(exact) == 1 and exact == again, (target, case)


def test_nothing_is_spilt() -> None:
    assert [row for row in budgets() if row["spills"]] == []


NARROW = {  # on sm_90, and why nothing of these is read 16 bytes at a time
    "plan_tiles": "four numbers of each of a few chunks, int32: one program, once a step, 128 bytes",
    "plan_splits": "contexts of as many sequences as there are, int32: one program, once a step, at most 1 KB",
}


def test_loads_are_wide_on_sm_90_but_for_what_is_named() -> None:
    for config in aot.CONFIGS:
        rows = [row for row in budgets() if row["target"] == "sm_90" and row["config"] == config]
        assert {row["kernel"] for row in rows if not row["wide_loads"]} == NARROW.keys(), config


def test_loops_are_told_from_what_is_around_them() -> None:
    code = """
.L_x_0:
 SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
.L_x_1:
 DEPBAR.LE SB0, 0x2 ;
 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
 @!P0 BRA `(.L_x_1) ;
 @!P1 BRA `(.L_x_0) ;
 @P1 BRA `(.L_x_2) ;
.L_x_2:
 SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
"""
    (loop,) = machine_code.product_loops(code)
    assert "HGMMA" in loop and "DEPBAR" in loop and "SHFL" not in loop


def test_broken_budgets_are_named() -> None:
    budget = budgets()[0]
    name = " ".join((budget["kernel"], budget["config"], budget["target"]))
    row: aot.BudgetRow = {**budget, "registers": budget["registers"] + 1, "matrix_instructions": -1}
    registers, instructions = aot.broken_budgets([row], [budget])
    assert registers == f"{name}: registers {budget['registers'] + 1}, at most {budget['registers']}"
    assert instructions == f"{name}: matrix_instructions -1, at least {budget['matrix_instructions']}"
    assert aot.broken_budgets([row], []) == [f"{name}: no budget"]
    assert aot.broken_budgets([budget], [budget]) == []


def test_the_command_explains_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(aot.aot_command, [])
    assert result.exit_code == 1 and "TRITON_INTERPRET is set" in result.output
    assert "sm_90" in CliRunner().invoke(aot.aot_command, ["--target", "sm_1"]).output
