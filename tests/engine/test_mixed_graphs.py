"""Steps with chunks of prompts that are padded and replayed give what eager ones give.

There is no device: plain torch reads where the chunks are when it is computed again, as kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.captures import Capture, replays_of
from test_graphs import generate

from dsc_kernels import ops
from dsc_kernels.chunks import PlacedChunks
from dsc_serve.config import EngineConfig
from dsc_serve.engine import captured, routing
from dsc_serve.engine import runner as runner_module
from dsc_serve.engine.device_inputs import DeviceInputs
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.graph_budget import GraphKey
from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.runner import Runner
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import EngineCapacity, SamplingParams


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    ops.use("plain")
    yield
    ops.use("auto")


def engine_of(
    folder: Path, capture: Capture | None, ahead: bool = False, step_tokens: int = 20, blocks: int = 90
) -> Engine:
    model = load_model(folder, "float32", torch.device("cpu"))
    sizes = {"max_running": 7, "step_tokens": step_tokens, "block_size": 4}
    config = EngineConfig(**sizes, prefix_cache=False, itl_target_ms=60_000.0)  # type: ignore[arg-type]
    context, windows = model.config.max_position_embeddings, model.groups.windows
    capacity = EngineCapacity(model.config.vocab_size, context, blocks, 4, kv_windows=windows)
    runner = Runner(model, capacity, step_tokens, 7, capture, ahead=ahead)
    return Engine(config, capacity, runner, (), True, routing=runner.routing, ahead=runner if ahead else None)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (length,), generator=g).tolist() for length in (3, 30, 1, 9, 17, 24, 2)]
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12 - i) for i in range(7)]
    return prompts, params


def replays(engine: Engine) -> dict[GraphKey, int]:
    assert isinstance(engine.runner, Runner) and engine.runner.graphs is not None
    return replays_of(engine.runner.graphs.graphs)


FORMS: list[dict[str, Any]] = [
    {"kind": "dsc"},
    {"kind": "moe", "position_embedding_type": "rope"},
    {"kind": "dense", "position_embedding_type": "rope", "window": 6},
    {"kind": "molora", "num_attention_heads": 4},
]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_replayed_steps_with_prompts_give_the_same_tokens_and_touch_no_other_block(
    form: dict[str, Any], ahead: bool, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts whole and in chunks, several at once, beside single tokens and without any."""
    monkeypatch.setattr(routing, "WATCHED", 1)
    folder = small_model(**form)
    prompts, params = requests()
    eager, replayed = engine_of(folder, None), engine_of(folder, Capture(), ahead)
    pools: list[list[torch.Tensor]] = []
    for engine in (eager, replayed):
        assert isinstance(engine.runner, Runner)
        pools.append([pool for caches in engine.runner.kv_caches for pool in caches])
    for pool in pools[1]:
        assert not pool[:-1].any(), "what was captured or compiled wrote to a block that is not spare"
    assert generate(replayed, prompts, params) == generate(eager, prompts, params)
    mixed = {key: count for key, count in replays(replayed).items() if key.tokens}
    assert set(mixed) == {("layers", 7, 20), ("layers", 2, 20)} and sum(mixed.values()) >= 5
    if not ahead:
        for pool, with_spare in zip(*pools, strict=True):
            torch.testing.assert_close(with_spare[:-1], pool, rtol=1e-4, atol=1e-5)
    if eager.routing is not None and replayed.routing is not None:
        seen = [engine.routing.report() for engine in (eager, replayed)]  # type: ignore[union-attr]
        assert seen[0].tokens == seen[1].tokens > 86
        assert [layer.distinct for layer in seen[0].layers] == [layer.distinct for layer in seen[1].layers]


class PackedInputs(Inputs):
    """As those of a device, which lies on the host here."""

    def __init__(self, step_tokens: int, requests: int, width: int, device: torch.device, groups: int = 1) -> None:
        super().__init__(step_tokens, requests, width, device, groups)
        self._device = DeviceInputs(3 + groups, step_tokens, groups, requests, width, device)


@pytest.mark.parametrize("ahead", [False, True])
def test_packed_inputs_are_where_each_graph_reads_them(
    ahead: bool, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it is captured: what lies there in another graph's order may be no context that any table holds."""
    folder = small_model("moe", position_embedding_type="rope")
    prompts, params = requests()
    want = generate(engine_of(folder, None), prompts, params)
    seen: list[StepBatch] = []
    hidden = Decoder.hidden

    def looked_at(self: Decoder, batch: StepBatch, *rest: Any) -> torch.Tensor:
        if isinstance(batch.chunks, PlacedChunks) or batch.decodes == len(batch.token_ids):
            assert int(batch.context_lens.max()) <= 48 and int(batch.slot_blocks.max()) <= 90
            seen.append(batch)
            if not generating:
                assert batch.context_lens.tolist() == [1] * len(batch.context_lens)
                assert bool((batch.slot_blocks == 90).all()) and bool((batch.block_tables == 90).all())
        return hidden(self, batch, *rest)

    generating = False
    monkeypatch.setattr(runner_module.Runner, "inputs_kind", PackedInputs)
    monkeypatch.setattr(Decoder, "hidden", looked_at)
    engine = engine_of(folder, Capture(), ahead)
    assert len(seen) >= 10 and seen[0].token_ids.dtype == (torch.int64 if ahead else torch.int32)
    generating = True
    assert generate(engine, prompts, params) == want
    assert {bool(key.tokens) for key in replays(engine)} == {False, True}


def test_a_step_with_more_chunks_than_are_told_of_runs_without_a_graph(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "CHUNKS", 2)
    folder, greedy = small_model(), SamplingParams(temperature=0, max_tokens=2)
    engine = engine_of(folder, Capture())
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8], [9]]
    want = generate(engine_of(folder, None), prompts, [greedy] * 4)
    assert generate(engine, prompts, [greedy] * 4) == want
    assert set(replays(engine)) == {("greedy", 4, 0)}
    assert generate(engine, prompts[2:], [greedy] * 2) == want[2:]
    assert ("layers", 2, 20) in replays(engine)


def test_padding_that_costs_more_than_launches_is_not_replayed(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "idle_rows", lambda config: 3)
    engine, greedy = engine_of(small_model(), Capture()), SamplingParams(temperature=0, max_tokens=1)
    generate(engine, [[1] * 16], [greedy])
    assert replays(engine) == {}
    generate(engine, [[1] * 17], [greedy])
    generate(engine, [[1] * 15, [2] * 5], [greedy] * 2)
    assert replays(engine) == {("layers", 2, 20): 2}


def test_native_kernels_have_their_chunks_behind_all_single_tokens(small_model: Callable[..., Path]) -> None:
    ops.use("auto")
    if ops.backend(torch.float32, torch.device("cpu")).name != "native":
        pytest.skip("no native kernels here")
    runner = engine_of(small_model(), Capture()).runner
    assert isinstance(runner, Runner) and runner.graphs is not None
    assert not any(key.tokens for key in runner.graphs.graphs.keys)
