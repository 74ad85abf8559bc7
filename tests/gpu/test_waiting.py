"""A step reads nothing from the device but the sampled ids, and its captured part has sizes that the host knows.

There is no GPU here: see `pretended`. So this says what the host does, not what kernels compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import NO_LAUNCH
from support.pretended import DEVICE, PretendedGpu, WaitedError, on_device, pretended_gpu
from torch import Tensor

from dsc_kernels import native, ops, plain
from dsc_serve.config import EngineConfig
from dsc_serve.engine import routing, sampler
from dsc_serve.engine import runner as runner_module
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.graphs import Capture, Graph
from dsc_serve.engine.penalties import adjust_together
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.engine.request import Request
from dsc_serve.engine.runner import Runner
from dsc_serve.engine.token_feed import TokenReading
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.sampling_params import SamplingParams

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="there is a GPU, or no compiled kernel",
)

FREE_BYTES = 10**7
FILTERED = {"temperature": 0.9, "top_k": 7, "top_p": 0.8, "min_p": 0.01, "seed": 1}
PENALISED = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.1, "logit_bias": {3: 1.5}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(monkeypatch, FREE_BYTES) as pretended:
        yield pretended
    ops.use("auto")
    native.use_router("auto")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the token ids that were read from the device; they are all zero."""
    seen: list[tuple[int, ...]] = []

    def read(tokens: Tensor) -> list[int]:
        assert on_device(tokens) and tokens.dtype == torch.int64
        seen.append(tuple(tokens.shape))
        return [0] * len(tokens)

    def tokens(reading: TokenReading) -> list[int]:
        seen.append((reading._count,))
        return [0] * reading._count

    monkeypatch.setattr(sampler, "read", read)
    monkeypatch.setattr(TokenReading, "tokens", tokens)
    return seen


class Again:
    """A graph whose replay computes again."""

    def __init__(self, gpu: PretendedGpu, compute: Callable[[], Tensor]) -> None:
        self.gpu, self.compute, self.replays = gpu, compute, 0
        with gpu.watched():
            self.out = compute()

    def replay(self) -> None:
        self.compute()
        self.replays += 1


def engine_on(
    gpu: PretendedGpu, folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: str = "auto", **settings: Any
) -> tuple[Engine, list[Again]]:
    graphs: list[Again] = []

    def capture(compute: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graphs.append(Again(gpu, compute))
        return graphs[-1], graphs[-1].out

    def capture_for(dtype: torch.dtype, device: torch.device) -> Capture | None:
        return capture if ops.triton_serves(dtype, device) else None

    monkeypatch.setattr(runner_module, "capture_for", capture_for)
    sizes: dict[str, Any] = {"max_running": 6, "step_tokens": 16, "block_size": 4, **settings}
    config = EngineConfig(model=str(folder), device="cuda", kernels=kernels, **sizes)
    model = prepare_model(config)
    engine = Engine.for_model(model, config, strict=True)
    assert all(on_device(pool) for pools in engine.runner.kv_caches for pool in pools)  # type: ignore[attr-defined]
    return engine, graphs


def serve(gpu: PretendedGpu, engine: Engine, params: list[SamplingParams]) -> int:
    """Steps until all requests are done."""
    for i, own in enumerate(params):
        engine.add(str(i), [1] * (2 + 3 * i), own)
    steps = 0
    with gpu.watched():
        while engine.has_work:
            engine.step()
            steps += 1
    return steps


@pytest.mark.parametrize(("dtype", "router"), [("float32", "exact"), ("bfloat16", "int8-certified")])
@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_a_step_reads_only_the_sampled_ids(
    kind: str,
    dtype: str,
    router: str,
    gpu: PretendedGpu,
    reads: list[tuple[int, ...]],
    small_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small_model(kind, position_embedding_type="rope")
    engine, graphs = engine_on(gpu, folder, monkeypatch, dtype=dtype, router_precision=router)
    if kind == "dsc":
        layers = engine.runner.model.layers  # type: ignore[attr-defined]
        assert all(layer.ffn.layer.screened == (router != "exact") for layer in layers)
    fields = (
        {"temperature": 0},
        {"temperature": 0.7},
        FILTERED,
        {**FILTERED, **PENALISED},
        {"temperature": 0, "min_tokens": 3},
    )
    params = [SamplingParams(max_tokens=4 + i, ignore_eos=True, **own) for i, own in enumerate(fields)]
    assert engine.runner.model.stack is not None, "its layers are not computed in one call"  # type: ignore[attr-defined]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    before = gpu.operations
    steps = serve(gpu, engine, params)
    assert gpu.operations > before and 0 < len(reads) <= steps
    assert sum(shape[0] for shape in reads) == sum(own.max_tokens or 0 for own in params)
    assert sum(graph.replays for graph in graphs) > 2


@pytest.mark.parametrize("kind", ["dsc", "moe"])
def test_nothing_is_read_before_the_next_step_is_launched(
    kind: str, gpu: PretendedGpu, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts in chunks and whole, greedy requests and such as sample, all of which draw tokens at least once."""
    engine, graphs = engine_on(gpu, small_model(kind, position_embedding_type="rope"), monkeypatch)
    order: list[str] = []

    def told(owner: type, method: str, event: str) -> None:
        original = getattr(owner, method)

        def call(*args: Any) -> Any:
            order.append(event)
            return original(*args)

        monkeypatch.setattr(owner, method, call)

    told(Runner, "launch", "launch")
    told(Runner, "run", "run")
    told(TokenReading, "tokens", "read")
    monkeypatch.setattr(sampler, "read", lambda tokens: pytest.fail("a step has been waited for"))
    fields = ({"temperature": 0}, {"temperature": 0.7}, FILTERED, {"temperature": 0, "min_tokens": 3}, {"seed": 3})
    params = [SamplingParams(max_tokens=4 + i, ignore_eos=True, **own) for i, own in enumerate(fields)]
    steps = serve(gpu, engine, params)
    assert order == ["launch", *["launch", "read"] * (steps - 2), "read"] and steps > 8
    assert sum(graph.replays for graph in graphs) > 4
    assert engine.counters.steps == steps - 1


@pytest.mark.parametrize("fields", [{"temperature": 0}, FILTERED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["dsc", "moe"])
def test_a_step_ahead_is_copies_and_one_replay(
    kind: str,
    fields: dict[str, Any],
    gpu: PretendedGpu,
    small_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of greedy requests nothing else is launched; others are sampled behind it, from logits that are there. Of steps
    with prompts the layers are one replay, too."""
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(routing, "WATCHED", 10**6)  # but the first
    engine, _ = engine_on(gpu, small_model(kind, position_embedding_type="rope"), monkeypatch)
    launched: list[str] = []
    watch = PretendedGpu._watch

    def seen(self: PretendedGpu, func: Any, *rest: Any) -> None:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name not in NO_LAUNCH:
            launched.append(name)
        watch(self, func, *rest)

    monkeypatch.setattr(PretendedGpu, "_watch", seen)
    monkeypatch.setattr(JITFunction, "run", lambda function, *args, **options: launched.append(function.fn.__name__))
    monkeypatch.setattr(Again, "replay", lambda graph: launched.append("replay"))
    monkeypatch.setattr(TokenReading, "tokens", lambda reading: [0] * reading._count)
    for i in range(3):
        engine.add(str(i), [1] * 5, SamplingParams(max_tokens=20, ignore_eos=True, **fields))
    steps = []
    with gpu.watched():
        while engine.has_work:
            launched.clear()
            engine.step()
            steps.append(list(launched))
    replayed = [step for step in steps if "replay" in step]
    assert len(replayed) == 20 and all("sample_rows" in step or "argmax" in step for step in replayed[:1])
    behind = [step[step.index("replay") + 1 :] for step in replayed[1:]]  # than that of the prompts
    before = {tuple(step[: step.index("replay")]) for step in replayed}
    assert before == {("copy_",), ("copy_", "_to_copy", "index_copy_")}, "the inputs; with rows of tables that are new"
    if fields["temperature"]:
        assert all("sample_rows" in step and not {"mm", "addmm"} & set(step) for step in behind)
    else:
        assert all(step == ["copy_"] for step in behind), "the tokens, for the host"


def test_without_the_step_ahead_each_step_is_waited_for(
    gpu: PretendedGpu, reads: list[tuple[int, ...]], small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "launch", lambda runner, work: pytest.fail("a step was launched ahead"))
    engine, _ = engine_on(gpu, small_model(), monkeypatch, step_ahead="off")
    steps = serve(gpu, engine, [SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)] * 2)
    assert len(reads) == engine.counters.steps == steps


def test_penalties_take_as_many_operations_however_many_rows_have_them(gpu: PretendedGpu) -> None:
    params = SamplingParams(**PENALISED, min_tokens=9, stop_token_ids=(3,))  # type: ignore[arg-type]
    counts = []
    for rows in (1, 7):
        logits = torch.zeros(rows, 61, device=DEVICE)
        requests = [Request(str(i), 2, [1, 2, 3 + i, 3], params, 9) for i in range(rows)]
        before = gpu.operations
        with gpu.watched():
            adjust_together(logits, requests, (5,))
        counts.append(gpu.operations - before)
    assert 8 < counts[1] <= counts[0] < 30


@pytest.mark.parametrize("kind", ["moe", "dsc"])
def test_plain_torch_is_not_captured_and_its_mixture_of_experts_waits(
    kind: str,
    gpu: PretendedGpu,
    reads: list[tuple[int, ...]],
    small_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the test above can fail."""
    engine, graphs = engine_on(gpu, small_model(kind), monkeypatch, kernels="plain")
    runner = engine.runner
    assert isinstance(runner, Runner) and runner.graphs is None and graphs == []
    assert isinstance(runner.model.layers[0].ffn.layer, plain.Moe if kind == "moe" else plain.Ffn)
    params = [SamplingParams(max_tokens=3)] * 2
    if kind == "moe":
        with pytest.raises(WaitedError, match="bincount"):
            serve(gpu, engine, params)
    else:
        assert serve(gpu, engine, params) > 2


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t[0].item(),
    "bool": lambda t: bool(t[0] > 0),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.to("cpu").numpy(),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "made there": lambda t: t + torch.tensor([1.0, 2.0, 3.0], device=DEVICE),
    "host indices": lambda t: t[torch.tensor([0, 1])],
    "host operand": lambda t: t + torch.ones(3),
    "pageable copy": lambda t: t + torch.tensor([1.0, 2.0, 3.0]).to(DEVICE),
    "blocking copy": lambda t: t.copy_(torch.ones(3).pin_memory()),
    "copy in pieces": lambda t: t.expand(2, 3)[:, :2].copy_(torch.ones(2, 3).pin_memory()[:, :2], non_blocking=True),
    "copy to the host": lambda t: torch.zeros(3).copy_(t),
    "pageable copy to the host": lambda t: torch.zeros(3).copy_(t, non_blocking=True),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_is_seen(name: str, gpu: PretendedGpu) -> None:
    tensor = torch.zeros(3, device=DEVICE)
    with gpu.watched(), pytest.raises(WaitedError):
        WAITS[name](tensor)


def test_what_does_not_wait_is_let_through(gpu: PretendedGpu) -> None:
    tensor = torch.zeros(3, device=DEVICE)
    with gpu.watched():
        tensor += torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        torch.ones(3).pin_memory().copy_(tensor, non_blocking=True)
        assert tensor[torch.arange(2, device=DEVICE)].shape == (2,)
        assert on_device(tensor.sort().values.cumsum(0))


def test_the_pool_takes_its_share_of_the_devices_memory(
    gpu: PretendedGpu, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_model(max_position_embeddings=4096, position_embedding_type="rope")
    engine, _ = engine_on(gpu, folder, monkeypatch)
    runner = engine.runner
    assert isinstance(runner, Runner)
    held = sum(pool.numel() * pool.element_size() for pools in runner.kv_caches for pool in pools)
    assert 0.75 * FREE_BYTES < held <= 0.8 * FREE_BYTES + 2 * held / engine.capacity.num_blocks


QUANTISED = "router=int8,bank=int8"


def test_weights_are_told_in_the_form_that_they_are_held_in(
    gpu: PretendedGpu, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing on a GPU reads the levels of routers and banks: they become numbers when they are loaded."""
    held = {}
    for keep in ("", QUANTISED):
        engine, _ = engine_on(gpu, small_model(), monkeypatch, keep=keep)
        model: Any = engine.runner.model  # type: ignore[attr-defined]
        held[keep] = dict(model.held)
        assert isinstance(model.layers[0].ffn.layer.router.weight, Tensor)
    assert held[""] == held[QUANTISED] and len(held[""]) == 1


@pytest.mark.parametrize("keep", ["", QUANTISED])
def test_the_bank_lies_on_the_device_once(
    keep: str, gpu: PretendedGpu, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engine_on(gpu, small_model(), monkeypatch, keep=keep)
    for layer in engine.runner.model.layers:  # type: ignore[attr-defined]
        assert isinstance(layer.ffn, DscFfn)
        assert layer.ffn.bank_bytes == 2 * 37 * 32 * layer.ffn.u.dtype.itemsize
        assert layer.ffn.layer.bank.u is layer.ffn.u and layer.ffn.layer.bank.v is layer.ffn.v  # type: ignore[attr-defined]
        assert on_device(layer.ffn.u)
