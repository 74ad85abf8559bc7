"""What the engine watches of routing: signatures, predictions, sharing and sums, against what the picks say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.small_models import small_config, wide_tensors

from dsc_kernels import native
from dsc_kernels.grouping import TILE
from dsc_kernels.min_hash import scramble
from dsc_kernels.sketch import BITS, Signature, Sketch
from dsc_serve import LLM, SamplingParams
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.engine.request import Request
from dsc_serve.engine.routing import WATCHED, RoutingWatch
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.decoder import dsc_layers
from dsc_serve.worker.messages import Stats, frame, from_engine_decoder

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
Picks = NDArray[np.int32]


@pytest.fixture(params=["plain", "auto"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    native.use("auto")


def bits(array: NDArray[np.uint64]) -> set[int]:
    return {i for i in range(BITS) if int(array[i // 64]) >> (i % 64) & 1}


@pytest.fixture
def router_setting() -> Iterator[None]:
    yield
    native.use_router("auto")


def expected_bits(sketch: Sketch, picks: Picks) -> set[int]:
    """Of picks [layers, tokens, K]."""
    found = set()
    for layer, row in enumerate(picks):
        for atom in row.ravel():
            hashed = int(scramble(np.array([layer * sketch.atoms + int(atom)]))[0])
            if hashed % sketch.divisor == 0:
                found.add(hashed // sketch.divisor % BITS)
    return found


@pytest.mark.parametrize(("atoms", "k", "vocabulary"), [(40, 3, 50), (5000, 8, 40_000)])
def test_a_sketch_holds_what_was_picked(kernels: str, atoms: int, k: int, vocabulary: int) -> None:
    native.use(kernels)
    random = np.random.default_rng(0)
    sketch = Sketch(3, atoms, k, vocabulary)
    assert (sketch.divisor > 1) == (atoms > 1000)
    counts, distinct = np.zeros((3, atoms), dtype=int), np.zeros(3, dtype=int)
    signatures = [Signature.empty() for _ in range(2)]
    wanted: list[set[int]] = [set(), set()]
    for tokens in (7, 1, 0, 30):
        picks = np.stack([[random.permutation(atoms)[:k] for _ in range(tokens + 2)] for _ in range(3)])
        picks = picks.astype(np.int32)[:, :tokens]  # the layers do not follow each other at once
        owners = np.sort(random.integers(0, 2, tokens))
        ids = random.permutation(vocabulary)[:tokens]
        sketch.observe(picks, ids, owners, signatures)
        for layer in range(3):
            np.add.at(counts[layer], picks[layer].ravel(), 1)
            distinct[layer] += len(np.unique(picks[layer]))
        for owner in range(2):
            wanted[owner] |= expected_bits(sketch, picks[:, owners == owner])
    assert (sketch.counts == counts).all() and (sketch.distinct == distinct).all()
    assert [bits(signature.bits) for signature in signatures] == wanted
    assert sketch.tokens == 38
    united = sketch.predict(ids.tolist())
    assert united is not None and bits(united) == expected_bits(sketch, picks)
    assert Sketch(3, atoms, k, vocabulary).predict([1, 2]) is None


def recorded(llm: LLM) -> tuple[RoutingWatch, list[Picks]]:
    routing = llm.engine.routing
    assert routing is not None
    steps: list[Picks] = []
    routing.on_picks = steps.append
    return routing, steps


def run(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.step()


def test_requests_carry_what_they_picked(small_model: Callable[..., Path], kernels: str) -> None:
    with LLM(
        str(small_model()), kernels=kernels, step_tokens=8, max_running=4, grouping="always", policy="affinity"
    ) as llm:
        routing, steps = recorded(llm)
        short = llm.engine.add("short", [5, 6, 7], GREEDY)
        long = llm.engine.add("long", list(range(20)), GREEDY)
        assert short.signature is None and long.signature is None
        run(llm)
        report = routing.report()
        tokens = sum(step.shape[1] for step in steps)
        assert tokens == 3 + 5 + 20 + 5 == report.tokens and len(steps) == report.steps
        both = set().union(*(expected_bits(routing.sketch, step) for step in steps))
        assert short.signature is not None and long.signature is not None
        assert bits(short.signature) | bits(long.signature) == both
        alone = expected_bits(routing.sketch, steps[0][:, :3])
        assert alone <= bits(short.signature)
        distinct = [sum(len(np.unique(step[layer])) for step in steps) for layer in range(2)]
        assert [layer.distinct for layer in report.layers] == distinct
        itemsize = 4 if llm.engine.runner.model.dtype == torch.float32 else 2  # type: ignore[attr-defined]
        assert report.bank_bytes == sum(distinct) * 2 * 32 * itemsize
        assert report.router_bytes == len(steps) * 2 * 37 * 32 * itemsize
        assert [layer.grouped_tiles for layer in report.layers] == [sum(s.shape[1] > 1 for s in steps)] * 2
        again = llm.engine.add("again", [5, 6, 7], GREEDY)
        assert again.signature is not None
        predicted = routing.sketch.predict([5, 6, 7])
        assert predicted is not None and bits(again.signature) == bits(predicted)


@pytest.mark.parametrize("policy", ["fcfs", "affinity"])
def test_steps_are_watched_now_and_then_and_the_sums_say_how_often(
    small_model: Callable[..., Path], policy: str
) -> None:
    with LLM(str(small_model()), policy=policy) as llm:
        routing = llm.engine.routing
        assert routing is not None
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1 + 2 * WATCHED, ignore_eos=True))
        report = routing.report()
        assert (report.steps, report.tokens) == (1 + 2, 3 + 2)
        llm.generate([[4, 5, 6, 7]], SamplingParams(temperature=0, max_tokens=1))
        again = routing.report()
        asked = policy == "affinity"
        assert (again.steps - report.steps, again.tokens - report.tokens) == (asked, 4 * asked)


@pytest.mark.skipif(native.active() is None, reason="the screen is native")
def test_a_screened_router_is_read_in_int8_and_where_it_cannot_tell_again(
    small_model: Callable[..., Path], router_setting: None
) -> None:
    prompt = list(range(20))
    config = EngineConfig(model=str(small_model()), dtype="bf16", router_precision="int8-certified", kv_tokens=96)
    engine = Engine.for_model(prepare_model(config), config)
    engine.add("a", prompt, SamplingParams(max_tokens=1))
    engine.step()
    assert engine.routing is not None
    report = engine.routing.report()
    assert report.screened == 2 * len(prompt)  # layers
    assert report.rescored >= 3 * report.screened  # at least those that are picked
    assert report.router_bytes == 2 * 37 * 32 + min(report.rescored * 32 * 2, 2 * 37 * 32 * 2)


@pytest.mark.skipif(native.active() is None, reason="the screen is native")
def test_steps_that_are_too_large_to_be_screened_count_as_reading_the_router(
    small_model: Callable[..., Path], router_setting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where those of few tokens are."""
    monkeypatch.setattr(native.Ffn, "screens", lambda layer, tokens: tokens <= 10)
    config = EngineConfig(model=str(small_model()), dtype="bf16", router_precision="int8-certified", kv_tokens=96)
    engine = Engine.for_model(prepare_model(config), config)
    engine.add("a", list(range(20)), SamplingParams(max_tokens=1))
    engine.step()
    assert engine.routing is not None and engine.routing.report().router_bytes == 2 * 37 * 32 * 2


def test_models_without_atoms_are_not_watched(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model("moe"))) as llm:
        assert llm.engine.routing is None
        assert len(llm.generate([[1, 2, 3]], GREEDY)[0].token_ids) == 6


@pytest.mark.parametrize("mode", ["always", "auto"])
def test_grouping_changes_no_output(small_model: Callable[..., Path], kernels: str, mode: str) -> None:
    folder = str(small_model())
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(61, (30, 9), generator=generator).tolist()
    params = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
    with LLM(folder, kernels=kernels, grouping="off") as llm:
        wanted = [output.token_ids for output in llm.generate(prompts, params)]
    with LLM(folder, kernels=kernels, grouping=mode) as llm:  # type: ignore[arg-type]
        assert [output.token_ids for output in llm.generate(prompts, params)] == wanted
        planners = [layer.planner for layer in dsc_layers(llm.engine.runner.model)]  # type: ignore[attr-defined]
        tiles = [planner.tiles for planner in planners if planner is not None]
        assert all(tiles) if mode == "always" else tiles == [0, 0]


def planted_model(folder: Path) -> Path:
    """A model whose tokens i pick the atoms 3c, 3c + 1 and 3c + 2 of every layer, where c is i mod 4."""
    config = small_config()
    tensors = wide_tensors(config)
    kind = torch.arange(61) % 4
    tensors["model.embed_tokens.weight"] = 0.01 * tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"][torch.arange(61), kind] += 10
    for name, tensor in tensors.items():
        if "embed_positions" in name or "o_proj" in name or name.endswith("router.bias"):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(float(name.endswith("weight")))
        elif name.endswith("router.weight"):
            tensor.zero_()
            tensor[torch.arange(12), torch.arange(12) // 3] = 3 + 0.1 * torch.arange(12)
    save_checkpoint(config, tensors, folder)
    return folder


def test_planted_routing_shares_as_computed_by_hand(tmp_path: Path, kernels: str) -> None:
    """Four kinds of tokens that pick 3 atoms each, no two kinds the same: token id i is of kind i mod 4, and the router
    sees the kind alone.

    Steps of 64 tokens, kinds in turn: 12 different atoms. A tile of 16 tokens holds 4 of each kind, so ρ = 12 / 48;
    grouped, a kind's 16 tokens are one tile, so ρ = 3 / 48. Beside them, steps of 64 tokens of one kind read 3 atoms
    instead of 12: bank bytes per token fall to a quarter.
    """
    folder = planted_model(tmp_path / "planted")
    ids = [list(range(16)) for _ in range(4)]
    one = [[4 * i for i in range(15)] + [0] for _ in range(4)]
    results = {}
    for mode in ("off", "always"):
        with LLM(str(folder), kernels=kernels, grouping=mode) as llm:  # type: ignore[arg-type]
            routing, steps = recorded(llm)
            logits = llm.logits(ids)
            mixed = routing.report()
            assert [step.shape[1] for step in steps] == [64]
            first = mixed.layers[0]
            assert first.distinct == 12 and mixed.bank_bytes == 2 * 12 * 2 * 32 * 4
            assert (first.arrival, first.grouped) == (12 / 48, 3 / 48)
            assert first.grouped_tiles == (64 // TILE if mode == "always" else 0)
            assert (mixed.composed, mixed.grouped) == (2, 2 if mode == "always" else 0)
            assert (first.dead, first.top, first.entropy) == pytest.approx((25 / 37, 1 / 12, np.log(12) / np.log(37)))
            assert mixed.picks_per_atom == 64 * 3 / 37
            llm.logits(one)
            assert routing.report().bank_bytes - mixed.bank_bytes == mixed.bank_bytes / 4
            results[mode] = logits
    assert all(torch.equal(a, b) for a, b in zip(results["off"], results["always"], strict=True))


def test_requests_that_came_first_get_their_prediction_after_the_first_step(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model()), max_running=1, step_tokens=8, policy="affinity") as llm:
        requests: list[Request] = [llm.engine.add(str(i), [1, 2, 3], GREEDY) for i in range(3)]
        assert [request.signature for request in requests] == [None] * 3
        llm.engine.step()
        llm.engine.step()
        assert all(request.signature is not None for request in requests)
        run(llm)


def test_the_report_travels_between_processes(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model())) as llm:
        llm.generate([[1, 2, 3]], GREEDY)
        assert llm.engine.routing is not None
        report = llm.engine.routing.report()
    others = {field.name: field.type() for field in msgspec.structs.fields(Stats) if field.required}
    message = from_engine_decoder.decode(frame(Stats(**others, routing=report))[4:])
    assert isinstance(message, Stats) and message.routing == report
