"""`bench bursts`: every policy gets the same bursts, and rounds that disagree are no difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.results import Ratio
from dsc_serve.bench.step.bursts import told_ratio
from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.cli import main


def test_the_command_compares_policies_side_by_side(small_model: Callable[..., Path], tmp_path: Path) -> None:
    out, model = tmp_path / "bursts.json", small_model(max_position_embeddings=64)
    command = ["bench", "bursts", str(model), "--burst", "2,6", "--beside", "0,2", "--prompt-tokens", "9"]
    command += ["--output-tokens", "5", "--waves", "2", "--rounds", "2", "--threads", "1", "--json", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert sorted({(row["burst"], row["beside"], row["round"], row["policy"]) for row in rows}) == sorted(
        (burst, beside, number, policy)
        for burst in (2, 6)
        for beside in (0, 2)
        for number in (1, 2)
        for policy in ("fcfs", "bursts")
    )
    for row in rows:
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"] and row["tokens_per_s"] > 0
        assert 0 <= row["itl_p50_ms"] <= row["itl_p90_ms"] <= row["itl_p99_ms"] <= row["largest_ms"]
    tables = done.output[done.output.index("| at once") :].strip()
    assert markdown_of_kept(load_kept(out)).startswith(f"{tables}\n\n`dsc-serve bench bursts"), "as printed"
    assert done.output.count("| bursts / fcfs |") == 4 and done.output.count("| 6 | 2 | ") == 3


@pytest.mark.parametrize(
    ("found", "more", "told"),
    [
        (Ratio(0.8, 0.7, 0.9, 3), False, "0.80, better (0.70 to 0.90)"),
        (Ratio(0.8, 0.7, 0.9, 3), True, "0.80, worse (0.70 to 0.90)"),
        (Ratio(0.8, 0.7, 1.1, 3), False, "no difference (0.70 to 1.10)"),
        (Ratio(1.01, 1.005, 1.02, 3), True, "no difference (1.00 to 1.02)"),
        (Ratio(0.8, 0.8, 0.8, 1), False, "0.80, one round"),
    ],
)
def test_a_ratio_is_told_apart_only_where_its_rounds_agree(found: Ratio, more: bool, told: str) -> None:
    assert told_ratio(found, more) == told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "lifo"], "--policy lifo is not known; allowed: fcfs, bursts"),
        (["--policy", "fcfs", "--policy", "fcfs"], "--policy is fcfs, fcfs; each may be there once"),
        (["--burst", "0"], "--burst is 0; it must be at least 1"),
        (
            ["--prompt-tokens", "30"],
            "has a context of 48 tokens; prompts of 30, answers of 64 and bursts of 32 need 142",
        ),
    ],
)
def test_bursts_that_cannot_be_are_refused_by_name(
    small_model: Callable[..., Path], options: list[str], message: str
) -> None:
    done = CliRunner().invoke(main, ["bench", "bursts", str(small_model()), *options])
    assert done.exit_code == 1 and message in done.output
