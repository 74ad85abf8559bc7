"""`bench engine --only profile`: the parts add up, the clocks are taken off again, and impossible steps are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.small_models import small_config, wide_tensors

from dsc_kernels import native, ops
from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.bench.step.least import read_bytes, weight_bytes, work
from dsc_serve.bench.step.profile import (
    BESIDE,
    OPERATORS,
    PARTS,
    SAMPLINGS,
    context_needed,
    profile,
)
from dsc_serve.cli import main
from dsc_serve.config import EngineConfig
from dsc_serve.model.decoder import Decoder

NATIVE = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


def model_of(kind: str) -> Decoder:
    config = small_config(kind, max_position_embeddings=256)
    return Decoder(config, wide_tensors(config), torch.float32, torch.device("cpu"))


@NATIVE
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("kind", "inside"),
    [("dsc", {"router", "compose", "static"}), ("moe", {"experts"}), ("dense", {"static"})],
)
def test_parts_add_up_to_the_wall_time(kind: str, inside: set[str], sampling: str) -> None:
    model = model_of(kind)
    found = profile(model, EngineConfig(kv_tokens=1024), None, 3, sampling, 4, rate_seconds=0.01)
    us = {part.name: part.us for part in found.parts}
    assert [name for name in PARTS if name in us] == list(us)
    always = {"schedule", "pack", "embed", "norms", "projections", "kv writes", "attention", "head", "other", "ipc"}
    assert always | inside <= set(us)
    assert ("sample" in us) == (sampling != "greedy")
    assert all(value > 0 for value in us.values())
    operators = sum(value for name, value in us.items() if name in OPERATORS)
    assert found.operators == pytest.approx(operators / sum(us.values()))
    assert [part.name for part in found.beside] == list(BESIDE)
    assert found.step_ms > 0
    assert found.ipc_ms > 0


@NATIVE
def test_nothing_is_timed_afterwards() -> None:
    model = model_of("dsc")
    before = set(vars(model))
    profile(model, EngineConfig(kv_tokens=1024), None, 2, "greedy", 2, rate_seconds=0.01)
    assert set(vars(model)) == before
    assert model.stack is not None
    assert model.stack.spent == {}


def test_without_native_kernels_the_blocks_are_one_part() -> None:
    chosen = ops.chosen()
    ops.use("plain")
    try:
        model = model_of("dsc")
        assert model.stack is None
        found = profile(model, EngineConfig(kv_tokens=1024), None, 2, "greedy", 2, rate_seconds=0.01)
    finally:
        ops.use(chosen)
    us = {part.name: part.us for part in found.parts}
    assert us["static"] > 0
    assert "router" not in us
    assert "norms" not in us


def test_bytes_and_flops_by_hand() -> None:
    model = model_of("moe")
    c = model.config
    d, layers, e = c.hidden_size, c.num_hidden_layers, 4
    expert = 2 * d * 20
    found = work(model, 1, context=10.0, greedy=True)
    assert found["projections"] == (layers * 4 * d * d * e, 2 * layers * 4 * d * d)
    assert found["attention"] == (layers * 10 * 2 * d * e, layers * 10 * 4 * d)
    assert found["head"] == (c.vocab_size * d * e, 2 * c.vocab_size * d)
    assert found["experts"] == pytest.approx((layers * (5 * d + 2 * expert) * e, 2 * layers * (5 * d + 2 * expert)))
    weights = layers * (4 * d * d + 5 * d + 2 * expert) + c.vocab_size * d
    assert weight_bytes(model, 1) == read_bytes(model, 1, greedy=True) == pytest.approx(weights * e)


def test_the_command_writes_what_it_prints(small_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = small_model("dsc", max_position_embeddings=256), tmp_path / "engine.json"
    arguments = [
        "bench",
        "engine",
        str(folder),
        "--only",
        "profile",
        "--running",
        "2",
        "--steps",
        "3",
        "--json",
        str(out),
    ]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    data = json.loads(out.read_text())
    assert [(p["running"], p["sampling"]) for p in data["profiles"]] == [(2, sampling) for sampling in SAMPLINGS]
    assert "long_prompt" not in data
    assert data["machine"]["threads"] == torch.get_num_threads()
    for name in ("schedule", "pack", "head", "ipc", "receive", "detokenise"):
        assert name in done.output
    tables = markdown_of_kept(load_kept(out))
    assert done.output[done.output.index("2 running, greedy") :].strip() in tables, "as printed"
    assert tables.startswith("```") and "`dsc-serve bench engine" in tables


def test_steps_beyond_the_context_are_refused(small_model: Callable[..., Path]) -> None:
    folder = small_model("dsc", max_position_embeddings=256)
    done = CliRunner().invoke(main, ["bench", "engine", str(folder), "--only", "profile", "--steps", "60"])
    assert done.exit_code == 1
    assert f"--steps 60 needs a context of {context_needed(60)} tokens; the model's is 256" in done.output
