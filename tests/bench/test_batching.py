"""`bench batching`: its caches against hand-made traces, and the command on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dsc_serve.bench.step.batching import BatchingBench, BatchingError, cut_prompts, hot_hits, recent_hits
from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.cli import main


def trace(*steps: list[int]) -> list[list[np.ndarray]]:
    return [[np.array(step, dtype=np.int32)] for step in steps]


def test_caches_hit_as_counted_by_hand() -> None:
    """The first of five steps teaches: 1 and 2 are hot. Of the 7 rows picked later, 3 are; of the last 2 atoms used
    before each step (the larger of a step's atoms being the later), 2."""
    steps = trace([1, 2], [2, 3], [1], [4, 5], [2, 5])
    assert hot_hits(steps, 2) == 3 / 7
    assert recent_hits(steps, 2) == 2 / 7
    assert recent_hits(steps, 5) == 4 / 7
    assert hot_hits(steps[:1], 2) == recent_hits(steps[:1], 2) == 0


def test_prompts_of_topics_come_in_turn() -> None:
    bench = BatchingBench("", prompt_tokens=10, topics=3)
    tokens = list(range(3000))
    prompts = cut_prompts(tokens, bench, 12)
    starts = [prompt[0] for prompt in prompts]
    assert all(prompt == tokens[prompt[0] : prompt[0] + 10] for prompt in prompts) and len(set(starts)) == 12
    assert [b - a for a, b in zip(starts, starts[3:], strict=False)] == [10] * 9
    assert [start // 1000 for start in starts[:3]] == [0, 1, 2]
    assert len({prompt[0] for prompt in cut_prompts(tokens, BatchingBench("", prompt_tokens=10, topics=0), 300)}) == 300
    assert len(cut_prompts(tokens[:150], bench, 13)) == 13, "three topics of five places each"
    with pytest.raises(BatchingError, match="the text has 149 tokens; 13 prompts of 10 need 150"):
        cut_prompts(tokens[:149], bench, 13)


def test_the_command_measures_every_variant(small_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "batching.json"
    command = ["bench", "batching", str(small_model()), "--requests", "2,16", "--prompt-tokens", "5"]
    command += ["--output-tokens", "6", "--oversubscription", "2", "--repeats", "2", "--json", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [(row["running"], row["policy"], row["grouping"]) for row in result["rows"]] == [
        (running, *variant)
        for running in (2, 16)
        for variant in (("fcfs", "off"), ("affinity", "off"), ("fcfs", "always"), ("fcfs", "auto"))
    ]
    for row in result["rows"]:
        assert 3 <= row["distinct"] <= 37 and 0 < row["bank_bytes_per_token"] <= 2 * 3 * 2 * 32 * 4
        assert (row["grouped_tiles"] > 0) == (row["grouping"] == "always")
        assert row["step_ms"] > 0 and 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
    for row in result["caches"]:
        assert 0 <= row["hot"] <= 1 and 0 <= row["recent"] <= 1
    assert "| 16 | affinity | recent |" in done.output
    tables = done.output[done.output.index("| running") :].strip()
    assert markdown_of_kept(load_kept(out)).startswith(f"{tables}\n\n`dsc-serve bench batching"), "as printed"


def test_a_model_without_atoms_is_refused(small_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["bench", "batching", str(small_model("moe"))])
    assert done.exit_code == 1 and "has no DSC layer" in done.output
