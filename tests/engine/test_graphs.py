"""Decode steps that are padded to a bucket and replayed give what unpadded ones give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.captures import Capture, replays_of

from dsc_kernels import ops
from dsc_kernels.plan import Planner
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.graph_budget import USUAL, GraphBudget, GraphKey, row_bytes
from dsc_serve.engine.runner import Runner
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.decoder import dsc_layers
from dsc_serve.sampling_params import EngineCapacity, SamplingParams


def engine_of(folder: Path, capture: Capture | None, max_running: int, budget: GraphBudget = USUAL) -> Engine:
    model = load_model(folder, "float32", torch.device("cpu"))
    capacity = EngineCapacity(
        model.config.vocab_size, model.config.max_position_embeddings, num_blocks=60, block_size=4
    )
    config = EngineConfig(max_running=max_running, step_tokens=24, block_size=4)
    runner = Runner(model, capacity, 24, max_running, capture, graph_budget=budget)
    return Engine(config, capacity, runner, (), strict=True)


def generate(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add(str(i), prompt, own)
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for delta in engine.step():
            tokens[int(delta.request_id)] += delta.token_ids
    return tokens


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_replayed_steps_give_the_same_tokens_and_touch_no_other_block(
    kind: str, small_model: Callable[..., Path]
) -> None:
    folder = small_model(kind, position_embedding_type="rope")
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (3 + 2 * i,), generator=g).tolist() for i in range(7)]
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=4 + 3 * i) for i in range(7)]
    plain = engine_of(folder, None, max_running=7)
    want = generate(plain, prompts, params)
    capture = Capture()
    padded = engine_of(folder, capture, max_running=7)
    assert isinstance(padded.runner, Runner)
    for kv_caches in padded.runner.kv_caches:
        for pool in kv_caches:
            assert not pool[:-1].any(), "what was captured or compiled wrote to a block that is not spare"
            pool[-1].zero_()
    assert generate(padded, prompts, params) == want
    assert capture.replayed == [1, 2, 4, 7]
    assert isinstance(plain.runner, Runner)
    for kv_caches, wider in zip(plain.runner.kv_caches, padded.runner.kv_caches, strict=True):
        for pool, with_spare in zip(kv_caches, wider, strict=True):
            torch.testing.assert_close(with_spare[:-1], pool, rtol=1e-4, atol=1e-5)
            assert bool(with_spare[-1].any()), "the rows of padding went elsewhere"


def test_steps_beyond_the_buckets_and_steps_of_prompts_run_eagerly(
    small_model: Callable[..., Path],
) -> None:
    folder, capture = small_model(), Capture()
    row = row_bytes(load_model(folder, "float32", torch.device("cpu")).config)
    engine = engine_of(folder, capture, 6, GraphBudget(nbytes=2 * 5 * row))  # the largest may take half
    greedy = SamplingParams(temperature=0, max_tokens=5)
    generate(engine, [[1, 2, 3]] * 6, [greedy] * 6)
    assert sum(graph.replays for graph in capture.graphs) == 0
    generate(engine, [[1, 2, 3]] * 3, [greedy] * 3)
    assert [len(g.out) for g in capture.graphs if g.replays] == [4]
    assert sum(graph.replays for graph in capture.graphs) == 4, "one step for the prompts, four for what follows"


def engine_with_forms(folder: Path, budget: GraphBudget = USUAL) -> tuple[Engine, Runner]:
    engine = engine_of(folder, Capture(), max_running=4, budget=budget)
    assert isinstance(engine.runner, Runner) and engine.runner.graphs is not None
    return engine, engine.runner


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 0, "presence_penalty": 0.5},
    {"temperature": 0, "logit_bias": {3: 4.0}},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "min_tokens": 5},
]


@pytest.mark.parametrize("fields", SAMPLED, ids=str)
def test_a_step_has_its_head_in_the_graph_as_it_needs_it(
    fields: dict[str, Any], small_model: Callable[..., Path]
) -> None:
    """Greedy ones the tokens, all others the logits; and nobody computes a head beside it."""
    folder = small_model()
    greedy = SamplingParams(temperature=0, max_tokens=9)
    own = SamplingParams(seed=3, max_tokens=5, **fields)
    prompts, want = [[1, 2, 3], [4, 5]], generate(engine_of(folder, None, 4), [[1, 2, 3], [4, 5]], [greedy, own])
    engine, runner = engine_with_forms(folder)
    assert runner.graphs is not None
    called = heads_called(runner)
    assert generate(engine, prompts, [greedy, own]) == want
    replays = replays_of(runner.graphs.graphs)
    assert replays == {GraphKey("sampled", 2): 4, GraphKey("greedy", 1): 4}
    assert len(called) == 1 + 8, "that of the prompts' step, and one within each replay"


def heads_called(runner: Runner) -> list[int]:
    """The rows of each head that is computed from now on, in graphs or behind them."""
    called: list[int] = []
    norm = runner.model.norm

    def counted(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        called.append(len(hidden))
        return norm(hidden, *rest)

    runner.model.norm = counted  # type: ignore[assignment]
    return called


def test_only_the_layers_of_a_graph_are_of_use_to_steps_of_another_form(small_model: Callable[..., Path]) -> None:
    folder = small_model()
    params = [SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=7) for i in range(3)]
    prompts = [[1, 2, 3], [4], [5, 6]]
    want = generate(engine_of(folder, None, 4), prompts, params)
    engine, runner = engine_with_forms(folder, GraphBudget(seconds=0.0))
    assert runner.graphs is not None and runner.graphs.graphs.keys == [GraphKey("greedy", 4)]
    assert generate(engine, prompts, params) == want
    assert replays_of(runner.graphs.graphs) == {GraphKey("greedy", 4): 6}
    engine, runner = engine_with_forms(folder, GraphBudget(graphs=2))
    assert runner.graphs is not None and {key.form for key in runner.graphs.graphs.keys} == {"layers"}
    assert generate(engine, prompts, params) == want
    assert sum(replays_of(runner.graphs.graphs).values()) == 6


def test_choices_of_one_prompt_differ_in_how_they_are_drawn(small_model: Callable[..., Path]) -> None:
    """The step of a prompt's last token is one of single tokens: its choices are looked at, too."""
    folder, found = small_model(), []
    choices = [SamplingParams(temperature=t, seed=i, max_tokens=12) for i, t in enumerate((0.0, 2.0, 2.0))]
    for capture in (None, Capture()):
        engine = engine_of(folder, capture, max_running=4)
        engine.add("0", [7], choices[0], siblings=[("1", choices[1]), ("2", choices[2])])
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for delta in engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        found.append(tokens)
    assert found[0] == found[1] and len({own[0] for own in found[0].values()}) > 1


def test_replayed_steps_count_and_captured_ones_do_not(small_model: Callable[..., Path]) -> None:
    class Replayed:
        def replay(self) -> None: ...

    model = load_model(small_model(), "float32", torch.device("cpu"))
    layers = dsc_layers(model)
    for layer in layers:
        layer.planner = Planner("always", layer.shape, None)
    capacity = EngineCapacity(
        model.config.vocab_size, model.config.max_position_embeddings, num_blocks=60, block_size=4
    )
    runner = Runner(model, capacity, 24, 6, lambda compute: (Replayed(), compute()))
    engine = Engine(EngineConfig(max_running=6, step_tokens=24, block_size=4), capacity, runner, (), strict=True)
    generate(engine, [[1, 2, 3]] * 3, [SamplingParams(temperature=0, max_tokens=5)] * 3)
    assert engine.counters.steps == 5
    planners = [layer.planner for layer in layers if layer.planner is not None]
    assert [(planner.steps, planner.grouped_steps) for planner in planners] == [(5, 5)] * len(layers)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_the_weights_stay_where_they_are_while_serving(kernels: str, small_model: Callable[..., Path]) -> None:
    ops.use(kernels)
    engine = engine_of(small_model(), None, max_running=6)
    assert isinstance(engine.runner, Runner)
    layers, kv_caches = dsc_layers(engine.runner.model), engine.runner.kv_caches

    def addresses() -> list[int]:
        banks = [t.data_ptr() for layer in layers for t in (layer.u, layer.v)]
        return banks + [pool.data_ptr() for pair in kv_caches for pool in pair]

    before = addresses()
    generate(engine, [[1, 2, 3, 4, 5]] * 6, [SamplingParams(temperature=0, max_tokens=8)] * 6)
    ops.use("auto")
    assert addresses() == before and len(set(before)) == len(before)
