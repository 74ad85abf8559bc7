"""`bench adapters`: its engines hold what they are said to hold, and the report adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_serve.cli import main


def test_the_command_reports_every_number_of_streams(small_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ["--streams", "1", "--streams", "3", "--loaded", "5", "--steps", "2", "--rounds", "3", "--cold", "2"]
    folder = small_model("dense", max_position_embeddings=80)
    done = CliRunner().invoke(
        main, ["bench", "adapters", str(folder), *options, "--rank", "2", "--threads", "1", "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    assert [(row["streams"], row["loaded"]) for row in found["beside"]] == [(1, 5), (3, 5)]
    assert [(row["streams"], row["distinct"]) for row in found["tenants"]] == [(1, 1), (3, 3)]
    for row in found["beside"] + found["tenants"]:
        assert row["lowest"] <= row["ratio"] <= row["highest"] and row["step_ms"] > 0
    one, three = (row["bytes"] for row in found["tenants"])
    assert 0 < one == found["cold"]["adapter_bytes"] and three == 3 * one
    assert found["cold"]["cold_p99_ms"] >= found["cold"]["cold_ms"] > 0
    kinds = [(row["streams"], row["kind"], row["rank"]) for row in found["kinds"]]
    assert kinds == [(n, kind, rank) for n in (1, 3) for kind, rank in (("lora", 2), ("shared", 32), ("lora-xs", 2))]
    for row in found["kinds"]:
        assert row["lowest"] <= row["share"] <= row["highest"] and row["step_ms"] > 0 < row["base_ms"]
    sizes = {(row["streams"], row["kind"]): row["bytes"] for row in found["kinds"]}
    assert sizes[3, "lora"] == 3 * sizes[1, "lora"]
    for row in found["memory"][1:]:
        each = (row["bytes"] - row["shared_bytes"]) // 5
        assert row["adapters"] == 5 and row["shared_bytes"] > 0 and row["bytes"] == row["shared_bytes"] + 5 * each
        for streams in (1, 3):
            assert sizes[streams, row["kind"]] == row["shared_bytes"] + streams * each, "a basis is read once"
    assert found["memory"][0]["shared_bytes"] == 0 and "process grew" in done.output
    assert "| 3 | 5 |" in done.output and "with one on disk" in done.output and "machine" in found


def test_one_kind_can_be_measured_alone(small_model: Callable[..., Path], tmp_path: Path) -> None:
    file, folder = tmp_path / "found.json", small_model("dense", max_position_embeddings=80)
    options = ["--streams", "2", "--loaded", "3", "--steps", "1", "--rounds", "1", "--cold", "1", "--threads", "1"]
    words = ["bench", "adapters", str(folder), *options, "--kind", "lora-xs", "--json", str(file)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    assert [row["kind"] for row in (*found["kinds"], *found["memory"])] == ["lora-xs", "lora-xs"]
    assert found["beside"][0]["loaded"] == 3 and found["tenants"][0]["distinct"] == 2


def test_what_the_context_does_not_hold_is_refused(small_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["bench", "adapters", str(small_model()), "--steps", "100"])
    assert done.exit_code != 0
    assert "needs a context of 990 tokens; the model's is 48" in done.output


def test_nothing_is_measured_of_a_model_that_no_adapter_fits(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsc_serve.model.peft.modules.linear_modules", lambda *given: iter(()))
    done = CliRunner().invoke(main, ["bench", "adapters", str(small_model("dense", max_position_embeddings=500))])
    assert done.exit_code != 0 and "no module of the model can be adapted" in done.output
