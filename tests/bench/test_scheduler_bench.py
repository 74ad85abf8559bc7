"""`bench scheduler` and `bench engine`: what they report is there, adds up, and repeats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.bench.step.scheduler import Costs, Workload, format_policies, plan_commit_ms, simulate
from dsc_serve.cli import main
from dsc_serve.engine.policies import StepBudget


def test_the_command_compares_policies(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    two = ["--policy", "fair", "--policy", "affinity"]
    done = CliRunner().invoke(main, ["bench", "scheduler", *two, "--requests", "150", "--json", str(file)])
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["plan_commit_ms"].keys() == {"running_64", "running_1024", "running_64_waiting_10000"}
    assert all(ms > 0 for ms in result["plan_commit_ms"].values())
    assert list(result["policies"]) == ["fair", "affinity"]
    tables = done.output[done.output.index("Plan, begin") :].strip()
    assert markdown_of_kept(load_kept(file)).startswith(f"{tables}\n\n`dsc-serve bench scheduler"), "as printed"
    for policy, figures in result["policies"].items():
        assert f"| {policy} |" in done.output
        assert figures["median_ttft_ms"] > 0 and figures["output_throughput"] > 0
        assert 0 < figures["prefix_hit_rate"] < 1


def test_a_simulation_repeats_and_the_prefix_cache_saves_time() -> None:
    workload, budget = Workload(requests=200, load=1.2), StepBudget(512, 32)
    first, second = (simulate("fcfs", workload, Costs(), budget, 2048, True) for _ in range(2))
    assert first == second
    without = simulate("fcfs", workload, Costs(), budget, 2048, False)
    assert without["prefix_hit_rate"] == 0
    assert without["median_ttft_ms"] > first["median_ttft_ms"]


def test_figures_that_nobody_made_are_left_out() -> None:
    found = simulate("fcfs", Workload(requests=1), Costs(), StepBudget(512, 32), 2048, True)
    assert found["p99_ttft_urgent_ms"] is None and found["median_ttft_ms"] is not None
    cells = format_policies({"plan_commit_ms": {}, "policies": {"fcfs": found}}).splitlines()[-1]
    assert cells.startswith("| fcfs | ") and " – |" in cells


def test_urgent_requests_and_small_tenants_are_helped_by_their_policies() -> None:
    workload, budget = Workload(requests=400, load=1.5), StepBudget(512, 16)
    by_policy = {name: simulate(name, workload, Costs(), budget, 2048, True) for name in ("fcfs", "priority", "fair")}
    assert by_policy["priority"]["p99_ttft_urgent_ms"] < by_policy["fcfs"]["p99_ttft_urgent_ms"] / 2
    assert by_policy["fair"]["p99_ttft_other_tenants_ms"] < by_policy["fcfs"]["p99_ttft_other_tenants_ms"] / 2


@pytest.mark.full
def test_planning_is_cheap() -> None:
    """Bounds for an idle machine, tripled for a busy one."""
    quiet = plan_commit_ms("fcfs", 64)
    assert plan_commit_ms("fcfs", 1024) < 3 * 1.5
    assert plan_commit_ms("fcfs", 64, 10_000) - quiet < 3 * 1.0


def test_a_policy_or_size_that_cannot_be_is_named() -> None:
    for options, message in (
        (["--policy", "nope"], "--policy nope is not known; allowed: fcfs, bursts, affinity"),
        (["--step-tokens", "8"], "--step-tokens 8 must be at least --max-running 64"),
        (["--blocks", "9"], "--blocks 9 must be at least 200"),
    ):
        done = CliRunner().invoke(main, ["bench", "scheduler", *options])
        assert done.exit_code == 1 and message in done.output


@pytest.mark.full
def test_the_engine_is_measured_with_and_without_the_prefix_cache(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    folder = small_model(max_position_embeddings=1024)
    sizes = {"streams": 2, "long-prompt": 600, "rounds": 1, "system-tokens": 160, "own-tokens": 8, "requests": 3}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = CliRunner().invoke(main, ["bench", "engine", str(folder), *options, "--json", str(file)])
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["shared_prefix"]["hit_rate"] == pytest.approx(160 / 168)
    assert result["long_prompt"]["steps"] >= 1
    assert done.output[done.output.index("2 requests decode") :].strip() in markdown_of_kept(load_kept(file))
    assert result["long_prompt"]["ttft_ms"] > result["long_prompt"]["quiet_median_ms"] > 0
    done = CliRunner().invoke(main, ["bench", "engine", str(folder), "--long-prompt", "2000"])
    assert done.exit_code == 1 and "the model's context is 1024" in done.output
