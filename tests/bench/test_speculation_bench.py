"""`bench speculation`: drafts are right as often as they are said to be, and the report adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.bench.step.known_drafts import KnownSource
from dsc_serve.cli import main


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
def test_a_known_draft_is_right_at_its_rate_wherever_it_stands(rate: float) -> None:
    answer = [(7 * i) % 60 for i in range(3000)]
    source = KnownSource(answer, 4, rate, 61)
    right = 0
    for place in range(0, 2990, 5):
        drafted, _ = source.draft([0] * (4 + place), 5)
        right += sum(a == b for a, b in zip(drafted, answer[place : place + 5], strict=True))
        again, _ = source.draft([0] * (5 + place), 4)
        assert list(again) == list(drafted)[1:], "whether a draft is right depends on its place alone"
    assert right / 2990 == pytest.approx(rate, abs=0.04)


def test_the_command_reports_every_system_and_width(small_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ["--streams", "1", "--streams", "3", "--right", "0", "--right", "1", "--prompt-tokens", "4"]
    options += ["--tokens", "40", "--rounds", "2", "--max-drafts", "3", "--threads", "1", "--json", str(file)]
    done = CliRunner().invoke(main, ["bench", "speculation", str(small_model()), *options])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    assert done.output[done.output.index("| ") :].strip() in markdown_of_kept(load_kept(file)), "as printed"
    rows = found["rows"]
    assert [(row["streams"], row["name"]) for row in rows] == [
        (streams, name) for streams in (1, 3) for name in ("none", "right 0", "right 1", "ngram")
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["equal"] > 0.6, row  # what is not has tokens that are equally likely
        if row["drafted"] and row["equal"] == 1:
            assert row["accepted"] == {"right 0": 0.0, "right 1": 1.0}.get(row["name"], row["accepted"])
    assert [(row["streams"], row["width"]) for row in found["widths"]] == [(s, w) for s in (1, 3) for w in range(4)]
    assert all(row["step_ms"] > 0 for row in found["widths"])
    assert "| 3 | right 1 |" in done.output and "machine" in found


def test_what_the_context_does_not_hold_is_refused(small_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["bench", "speculation", str(small_model()), "--tokens", "60"])
    assert done.exit_code != 0
    assert "--prompt-tokens and --tokens are 108 together; the model's context is 48" in done.output
