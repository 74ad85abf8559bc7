"""`dsc-serve bench tenants`: systems in turn in one process, on small models; no time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.small_models import small_config, wide_tensors

from dsc_serve.bench.step.kept import tenants_tables as tables
from dsc_serve.cli import main
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.graft import graft

WORDS = ("--steps", "2", "--rounds", "2", "--streams", "1", "--streams", "3", "--threads", "1", "--dtype", "float32")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = small_config("dense", mlp_gated=True, hidden_act="silu", max_position_embeddings=256)
    save_checkpoint(config, wide_tensors(config), tmp_path / "base")
    return tmp_path / "base"


def test_all_systems_are_timed_and_their_bytes_told(base: Path, tmp_path: Path) -> None:
    words = ["bench", "tenants", str(base), "--atoms", "40", "--picks", "3", "--rank", "2", "--shared-rank", "5"]
    result = CliRunner().invoke(main, [*words, *WORDS, "--loaded", "70", "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    rows, memory = found["steps"], found["memory"]
    names = ["without a bank", "the base", "tenants", "LoRA r 2", "cores K 5", "LoRA-XS r 2"]
    assert [(row["streams"], row["system"]) for row in rows] == [(n, name) for n in (1, 3) for name in names]
    assert all(row["step_ms"] > 0 and row["lowest"] <= row["ratio"] <= row["highest"] for row in rows)
    size = 2 * (40 + 32) * 4  # of a tenant, to whole panels more
    read = {(row["streams"], row["system"]): row["read_bytes"] for row in rows}
    assert size <= read[1, "tenants"] < 1.4 * size and read[3, "tenants"] == 3 * read[1, "tenants"]
    assert read[3, "the base"] == read[3, "without a bank"] == 0 < read[1, "LoRA r 2"]
    assert "| 3 | tenants |" in result.output and "| 3 | cores K 5 |" in result.output
    assert (memory["tenants"], memory["bytes"], memory["tokens"]) == (70, 70 * read[1, "tenants"], 70 * 4)
    assert memory["bank_bytes"] == 2 * 3 * 40 * 32 * 4 and memory["lora_bytes"] == read[1, "LoRA r 2"]
    assert memory["evicted"] == 0 and memory["seconds"] > 0
    assert "70 tenants in memory: " in result.output
    assert result.output.endswith(f"{tables(found)}\n"), "what is kept gives the same tables again"


def test_a_model_with_a_bank_is_measured_as_it_is(base: Path, tmp_path: Path) -> None:
    graft(base, tmp_path / "grafted", 40, 3)
    words = ["bench", "tenants", str(tmp_path / "grafted"), "--rank", "0", "--loaded", "0", *WORDS]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "without a bank" not in result.output and "LoRA" not in result.output and "| 1 | the base |" in result.output
    assert "cores K" not in result.output and "in memory" not in result.output
    short = CliRunner().invoke(main, ["bench", "tenants", str(base), *WORDS, "--steps", "999"])
    assert short.exit_code == 1 and "needs a context of" in short.output
