"""Where the time of a step goes: every part of it, beside what reading and computing it takes at least.

Parts are timed by wrapping the engine's own methods on one instance and by the native stack's clock, which counts only
while it is asked to; steps are also timed without any of that, and those times are the ones compared with rooflines.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import torch

from dsc_kernels import ops
from dsc_kernels.backend import MeasuredStack
from dsc_serve.bench.layer.roofline import gemm_rate
from dsc_serve.bench.step.least import read_bytes, weight_bytes, work
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.output import Delta
from dsc_serve.engine.runner import Runner
from dsc_serve.model.config import MoeConfig
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.text.stream import TextStream
from dsc_serve.text.tokenizer import Tokenizer

PROMPT_TOKENS = 48
WARM_STEPS = 8
STEPS_PER_READ = 4
SAMPLINGS = {"greedy": (0.0, 1.0), "temperature 0.8, top_p 0.95": (0.8, 0.95)}  # temperature, top_p
OPERATORS = (
    *("embed", "norms", "projections", "kv writes", "attention"),
    *("router", "compose", "static", "experts", "ffn waiting", "head", "sample"),
)
PARTS = ("schedule", "pack", *OPERATORS, "watch routing", "other", "ipc")
BESIDE = ("receive", "detokenise")


class StepPart(msgspec.Struct, frozen=True):
    """A part of a step."""

    name: str
    us: float  # microseconds
    bytes: float = 0.0  # that it reads of weights, or of keys and values
    flops: float = 0.0  # of these
    least_us: float = 0.0  # that bytes and FLOPs take, reading and computing at the same time


class StepProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of single tokens of `running` requests."""

    running: int
    sampling: str
    step_ms: float  # median of steps that nothing is timed in
    ipc_ms: float  # of telling the API process, by a socket
    parts: list[StepPart]  # means of timed steps, in the engine process
    beside: list[StepPart]  # in the API process, which shares the machine
    operators: float  # the share of operators in the wall time of the timed steps
    weight_bytes: float  # of all weights that a step needs, each once, in the model's dtype
    read_bytes: float  # likewise, but of those that are screened only the int8
    bandwidth: float  # bytes/s of reading as many bytes of another weight, by medians between the steps
    flops_per_s: float  # of large products
    weights_ratio: float  # step_ms over reading weight_bytes at that rate
    read_ratio: float  # step_ms over reading read_bytes


class Reading:
    """How fast a weight of so many bytes is read: as the product with one vector, or summed, whichever is faster."""

    def __init__(self, size: float, model: Decoder) -> None:
        d = model.config.hidden_size
        rows = max(1, int(size) // (d * model.dtype.itemsize))
        weight = torch.full((rows, d), 1e-3, dtype=model.dtype, device=model.device)
        x, flat = torch.ones(1, d, dtype=model.dtype, device=model.device), weight.view(torch.int32).view(-1)
        linear = ops.linear(weight)
        self._bytes = weight.nbytes
        self._runs: list[Callable[[], object]] = [lambda: linear(x), flat.sum]
        self._seconds: list[list[float]] = [[] for _ in self._runs]

    def sample(self) -> None:
        for run, seconds in zip(self._runs, self._seconds, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)

    @property
    def bandwidth(self) -> float:
        """Bytes/s."""
        return self._bytes / min(map(statistics.median, self._seconds))


def context_needed(steps: int) -> int:
    """Tokens of a request that takes part in a profile of so many steps."""
    return PROMPT_TOKENS + output_tokens(steps)


def output_tokens(steps: int) -> int:
    return 2 * steps + WARM_STEPS + 2 * PROMPT_TOKENS


class PartTimer:
    """Seconds by name."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, owner: object, method: str, name: str) -> Iterator[None]:
        """Count the calls of one instance's method while the context lasts."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                self.spent[name] += time.perf_counter() - start

        own = method in vars(owner)
        setattr(owner, method, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, method, inner)
            else:
                delattr(owner, method)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - start


class Talk:
    """What a step's news cost on both sides of the socket: one message out; in, decoded, and turned into text."""

    def __init__(self, requests: dict[str, SamplingParams], tokenizer: Tokenizer | None) -> None:
        self._here, self._there = socket.socketpair()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[Delta]).decode
        self._texts = {name: TextStream(tokenizer, [], params) for name, params in requests.items()}

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *error: object) -> None:
        self._here.close()
        self._there.close()

    def send(self, deltas: list[Delta]) -> int:
        body = self._encode(deltas)
        self._here.sendall(body)
        return len(body)

    def receive(self, size: int) -> list[Delta]:
        return self._decode(self._there.recv(size, socket.MSG_WAITALL))

    def detokenise(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._texts[delta.request_id].push(delta.token_ids)


@torch.inference_mode()  # as in the engine process
def profile(
    model: Decoder,
    config: EngineConfig,
    tokenizer: Tokenizer | None,
    running: int,
    sampling: str,
    steps: int,
    rate_seconds: float = 0.3,
) -> StepProfile:
    """Measure `steps` steps without and as many with timers, and this machine's rates before and after."""
    engine = Engine.for_model(model, config)
    assert isinstance(engine.runner, Runner)
    for pool in chain.from_iterable(engine.runner.kv_caches):
        pool.zero_()  # memory that nobody has written to yet is slow the first time
    rng = np.random.default_rng(0)
    requests, (temperature, top_p) = {}, SAMPLINGS[sampling]
    for i in range(running):
        params = SamplingParams(
            temperature=temperature, top_p=top_p, seed=i, max_tokens=output_tokens(steps), ignore_eos=True
        )
        prompt = rng.integers(0, model.config.vocab_size, PROMPT_TOKENS).tolist()
        requests[engine.add(str(i), prompt, params).id] = params
    while any(request.num_uncomputed > 1 for request in engine.scheduler.running.values()) or engine.scheduler.waiting:
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    weights, read = weight_bytes(model, running), read_bytes(model, running, greedy=not temperature)
    reading = Reading(weights, model)
    flops = gemm_rate(model.dtype, model.device, rate_seconds)
    with Talk(requests, tokenizer) as talk:
        plain, told = [], []
        for i in range(steps):
            if i % STEPS_PER_READ == 0:
                reading.sample()
            start = time.perf_counter()
            deltas = engine.step()
            middle = time.perf_counter()
            size = talk.send(deltas)
            plain.append(middle - start)
            told.append(time.perf_counter() - middle)
            talk.receive(size)
        clock, wall = timed_steps(engine, model, talk, steps, reading)
    context = PROMPT_TOKENS + WARM_STEPS + 1.5 * steps
    least = work(model, running, context, greedy=not temperature)

    def part(name: str) -> StepPart:
        size, count = least.get(name, (0.0, 0.0))
        seconds = max(size / reading.bandwidth, count / flops)
        return StepPart(name, 1e6 * clock.spent[name] / steps, size, count, 1e6 * seconds)

    clock.spent["other"] = wall - sum(clock.spent[name] for name in PARTS)
    step = statistics.median(plain)
    return StepProfile(
        running=running,
        sampling=sampling,
        step_ms=1e3 * step,
        ipc_ms=1e3 * statistics.median(told),
        parts=[part(name) for name in PARTS if clock.spent[name]],
        beside=[part(name) for name in BESIDE],
        operators=sum(clock.spent[name] for name in OPERATORS) / wall,
        weight_bytes=weights,
        read_bytes=read,
        bandwidth=reading.bandwidth,
        flops_per_s=flops,
        weights_ratio=step * reading.bandwidth / weights,
        read_ratio=step * reading.bandwidth / read,
    )


def timed_steps(engine: Engine, model: Decoder, talk: Talk, steps: int, reading: Reading) -> tuple[PartTimer, float]:
    """Seconds of steps by part, and of the steps with telling the API process, with reads between as in other steps."""
    clock, wall = PartTimer(), 0.0
    runner, scheduler = engine.runner, engine.scheduler
    assert isinstance(runner, Runner)
    with ExitStack() as stack:
        for owner, method, name in (
            *((scheduler, method, "schedule") for method in ("expire", "plan", "begin", "commit")),
            (scheduler.step_time, "observe", "schedule"),
            (runner, "pack", "pack"),
            (model, "hidden", "layers"),
            (model, "argmax_tokens", "head"),
            (model, "logits", "head"),
            (runner, "sampler", "sample"),
            *(
                (runner.routing, method, "watch routing")
                for method in ("begin", "record")
                if runner.routing is not None
            ),
        ):
            stack.enter_context(clock.on(owner, method, name))
        if isinstance(model.stack, MeasuredStack):
            model.stack.measure(True)
            stack.callback(model.stack.measure, False)
        for i in range(steps):
            if i % STEPS_PER_READ == 0:
                reading.sample()
            start = time.perf_counter()
            deltas = engine.step()
            with clock.part("ipc"):
                size = talk.send(deltas)
            wall += time.perf_counter() - start
            with clock.part("receive"):
                received = talk.receive(size)
            with clock.part("detokenise"):
                talk.detokenise(received)
        split_blocks(clock, model)
    return clock, wall


def split_blocks(clock: PartTimer, model: Decoder) -> None:
    """The layers' time by what the native stack counted; without one it is all "static"."""
    layers = clock.spent.pop("layers")
    spent = model.stack.spent if isinstance(model.stack, MeasuredStack) else {}
    if not spent:
        clock.spent["static"] = layers
        return
    ffn = spent["ffn"]
    inside = {"router": spent["router"], "static": spent["static"], "compose": spent["compose"]}
    if isinstance(model.config.ffn, MoeConfig):
        inside = {"experts": ffn}
    for name, seconds in inside.items():
        clock.spent[name] = seconds
    clock.spent["ffn waiting"] = max(0.0, ffn - sum(inside.values()))
    for name in ("embed", "norms", "projections", "kv writes", "attention"):
        clock.spent[name] = spent[name]


def format_profiles(found: list[StepProfile]) -> str:
    lines = []
    for p in found:
        lines += [
            f"{p.running} running, {p.sampling}: a step takes {p.step_ms:.3f} ms and telling of it {p.ipc_ms:.3f} ms; "
            f"operators are {p.operators:.1%} of the wall time",
            f"its weights are {p.weight_bytes / 1e6:.1f} MB: the step takes {p.weights_ratio:.2f} times reading them "
            f"once; with screening it reads {p.read_bytes / 1e6:.1f} MB, {p.read_ratio:.2f} times "
            f"({p.bandwidth / 1e9:.1f} GB/s; products {p.flops_per_s / 1e9:.0f} GFLOP/s)",
            f"{'part':<16}{'us':>10}{'share':>9}{'MB':>9}{'MFLOP':>9}{'least us':>10}",
        ]
        wall = sum(part.us for part in p.parts)
        for part in p.parts:
            row = f"{part.name:<16}{part.us:>10.1f}{part.us / wall:>9.1%}"
            if part.least_us:
                row += f"{part.bytes / 1e6:>9.2f}{part.flops / 1e6:>9.1f}{part.least_us:>10.1f}"
            lines.append(row)
        beside = ", ".join(f"{part.name} {part.us:.1f}" for part in p.beside)
        lines += [f"in the API process, per step, us: {beside}", ""]
    return "\n".join(lines)
