"""Graphs on a pretended GPU: within the budget, beyond 256 sequences, and no step makes more than is estimated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.pretended import PretendedGpu
from test_waiting import engine_on, gpu, pytestmark, reads  # noqa: F401

from dsc_serve.engine.graph_budget import GraphKey, buckets, head_bytes, kept_bytes, mixed, row_bytes
from dsc_serve.engine.graph_forms import FORMS
from dsc_serve.engine.runner import Runner
from dsc_serve.model.batch import StepBatch
from dsc_serve.sampling_params import SamplingParams


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
@torch.inference_mode()
def test_a_layer_of_a_step_makes_no_more_than_is_estimated(
    kind: str,
    gpu: PretendedGpu,  # noqa: F811
    small_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wide layers, as where it matters; all that each of them makes, though none of it outlives the next."""
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    ffn = {"dsc": {"num_atoms": 900, "static_size": 600}, "moe": {"expert_size": 700}, "dense": {"size": 1400}}
    ffn["molora"] = {"num_adapters": 40, "static_size": 500}
    sizes = {"num_hidden_layers": 3, "position_embedding_type": "rope"}
    engine, _ = engine_on(
        gpu, small_model(kind, ffn.get(kind), **wide, **sizes), monkeypatch, max_running=32, step_tokens=48
    )
    runner, model = engine.runner, engine.runner.model  # type: ignore[attr-defined]
    assert isinstance(runner, Runner) and runner.graphs is not None
    before = gpu.nbytes
    held = runner._inputs.held(32, 32)
    runner._layers_of(StepBatch(*held, 32, runner._max_context_len, ()))
    layers = gpu.nbytes - before
    assert 0 < layers / 3 <= 32 * row_bytes(model.config)
    for name in ("greedy", "sampled"):
        before = gpu.nbytes
        runner.graphs.graphs.replay(GraphKey(name, 32))
        head = gpu.nbytes - before - layers
        assert 32 * 4 * model.config.vocab_size <= head <= 32 * head_bytes(model.config), name
    kept = sum(kept_bytes(model.config, form) for form in FORMS.values())
    assert runner.graphs._room.logits.nbytes == 32 * kept


@torch.inference_mode()
def test_steps_of_more_than_256_sequences_are_replayed(
    gpu: PretendedGpu,  # noqa: F811
    reads: list[tuple[int, ...]],  # noqa: F811
    small_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small_model(position_embedding_type="rope")
    engine, graphs = engine_on(gpu, folder, monkeypatch, max_running=400, step_tokens=800, graphs=12)
    assert len(graphs) == 12 and engine.captured.startswith("12 graphs for steps of 1 to 400 sequences")
    assert "(4 greedy to 400, 4 sampled to 400, 4 with prompts to 800 tokens)" in engine.captured
    more = 2 * len(buckets(400)) + len(mixed(buckets(400), 800)) - 12
    assert f"{more} more would pad steps less" in engine.captured
    for i in range(330):
        engine.add(str(i), [1, 2], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    with gpu.watched():
        while engine.has_work:
            engine.step()
    replayed = [len(graph.out) for graph in graphs if graph.replays]
    assert max(replayed) == 400 and max(reads) > (256,)
