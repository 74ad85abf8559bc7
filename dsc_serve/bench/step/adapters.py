"""What adapters cost in one process: who has none beside many in memory, steps of many tenants, and a cold start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.bench.step.profile import Reading
from dsc_serve.bench.step.streams import Streams, closing, greedy, interleaved, needed_tokens, sized
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices

PROMPT_TOKENS = 48
SIZE = 0.02  # of the numbers of an update, beside which a base's own are small enough to stay what they are


class BesideLoaded(msgspec.Struct, frozen=True):
    """Streams without adapters, in an engine with so many in memory beside one that knows of none."""

    streams: int
    loaded: int
    step_ms: float
    without_ms: float
    ratio: float  # tokens per second of the first over the second, the median of the rounds' own
    lowest: float  # of the rounds' ratios
    highest: float  # likewise


class ManyTenants(msgspec.Struct, frozen=True):
    """Streams that have an adapter each, beside as many without, in one engine's steps."""

    streams: int
    distinct: int
    step_ms: float
    base_ms: float
    added_ms: float  # median of the rounds' own
    bytes: int  # of the distinct adapters that a step reads
    bandwidth: float  # bytes/s of reading as many of another weight
    ratio: float  # added_ms over reading these bytes at that rate
    lowest: float
    highest: float


class ColdStart(msgspec.Struct, frozen=True):
    """Median milliseconds to the first token of a prompt: without an adapter, with one in memory, with one on disk."""

    base_ms: float
    warm_ms: float
    cold_ms: float
    cold_p99_ms: float
    adapter_bytes: int


class Adaptable(Protocol):
    """A model, or where one comes from."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def origin(self) -> Origin | None: ...


def write_random(model: Adaptable, folder: Path, count: int, rank: int) -> list[str]:
    """Write so many adapters of all modules, in PEFT's form; returns their names.

    They are of four kinds of random numbers: content tells them apart by its scale, so that writing a thousand takes no
    thousand times drawing. Raises CheckpointError where the model has no module that can be adapted.
    """
    modules = Base(model.config, model.origin).modules.values()
    if not modules:
        raise CheckpointError("no module of the model can be adapted")
    drawn = []
    for seed in range(min(count, 4)):
        g = torch.Generator().manual_seed(seed)
        drawn.append(
            {
                own.name: Matrices(
                    SIZE * torch.randn(rank, own.into, generator=g), SIZE * torch.randn(own.out, rank, generator=g)
                )
                for own in modules
            }
        )
    names = [f"tenant-{i:04d}" for i in range(count)]
    for i, name in enumerate(names):
        write_adapter(folder / name, "bench", rank * (1 + i / 1e6), drawn[i % 4])
    return names


def most_bytes(model: Decoder, rank: int) -> int:
    """What an adapter of all modules takes in memory at most: panels are padded."""
    element = model.dtype.itemsize
    return sum(2 * (rank + 16) * (out + into + 64) * element for out, into in module_shapes(model.config).values())


def context_needed(streams: int, steps: int, rounds: int) -> int:
    """Tokens of a request that decodes all the time."""
    return needed_tokens(PROMPT_TOKENS, streams, steps * rounds)


def beside_loaded(
    model: Decoder, config: EngineConfig, names: Sequence[str], streams: int, steps: int, rounds: int
) -> BesideLoaded:
    """Steps of the two engines in turn, in each of which nobody has an adapter.

    config: with the folder of adapters of these names, and room for all of them.
    """
    with_them = Streams(model, config, streams, PROMPT_TOKENS, steps * rounds)
    without = Streams(model, msgspec.structs.replace(config, adapters=""), streams, PROMPT_TOKENS, steps * rounds)
    with closing(with_them, without):
        with_them.engine.arrivals.check([AdapterChoice.of(name) for name in names], with_them.engine.step)
        adapters = with_them.engine.arrivals.adapters
        assert adapters is not None
        loaded = adapters.in_memory
        for own in (with_them, without):
            own.begin([None])
        times = [interleaved([with_them, without], steps) for _ in range(rounds)]
    ratios = [alone / own for own, alone in times]
    return BesideLoaded(
        streams=streams,
        loaded=loaded,
        step_ms=statistics.median(own for own, _ in times),
        without_ms=statistics.median(alone for _, alone in times),
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
    )


def many_tenants(
    model: Decoder, config: EngineConfig, names: Sequence[str], streams: int, steps: int, rounds: int
) -> ManyTenants:
    """Steps of streams with an adapter each, all different where there are as many names, and of ones without."""
    choices = [AdapterChoice.of(name) for name in names[:streams]]
    tenants, base = (Streams(model, config, streams, PROMPT_TOKENS, steps * rounds) for _ in range(2))
    with closing(tenants, base):
        tenants.begin(choices)
        base.begin([None])
        report = tenants.engine.adapter_report
        before = report.read_bytes, tenants.engine.counters.steps
        tenants.step()
        size = (report.read_bytes - before[0]) // (tenants.engine.counters.steps - before[1])
        reading, times = Reading(size, model), []
        for _ in range(rounds):
            times.append(interleaved([tenants, base], steps))
            reading.sample()
    least_ms = 1e3 * size / reading.bandwidth
    ratios = [(own - alone) / least_ms for own, alone in times]
    return ManyTenants(
        streams=streams,
        distinct=len(set(choices)),
        step_ms=statistics.median(own for own, _ in times),
        base_ms=statistics.median(alone for _, alone in times),
        added_ms=statistics.median(own - alone for own, alone in times),
        bytes=size,
        bandwidth=reading.bandwidth,
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
    )


def cold_start(model: Decoder, config: EngineConfig, names: Sequence[str]) -> ColdStart:
    """One request after the other: each adapter is cold once and then warm, and the base is asked in between.

    Files are in the system's cache, as they are for who has just written them.
    """
    alone = msgspec.structs.replace(config, prefix_cache=False)
    engine = Engine.for_model(model, sized(alone, 4 * (PROMPT_TOKENS + 2 + config.block_size), 1))
    spent: dict[str, list[float]] = {"base": [], "warm": [], "cold": []}

    def first_token(request_id: str, choice: AdapterChoice | None) -> float:
        prompt = [sum(request_id.encode()) % engine.capacity.vocab_size] * PROMPT_TOKENS
        began = time.perf_counter()
        engine.add(request_id, prompt, greedy(1), adapter=choice)
        while True:
            if engine.arrivals:
                engine.arrivals.wait()
            for delta in engine.step():
                if delta.error:
                    raise RuntimeError(delta.error)
                if delta.token_ids:
                    return 1e3 * (time.perf_counter() - began)

    try:
        first_token("first", None)
        for name in names:
            for kind, choice in (("base", None), ("cold", AdapterChoice.of(name)), ("warm", AdapterChoice.of(name))):
                spent[kind].append(first_token(f"{kind} {name}", choice))
        adapters = engine.arrivals.adapters
        assert adapters is not None
        size = adapters.nbytes // adapters.in_memory
    finally:
        engine.close()
    cold = sorted(spent["cold"])
    return ColdStart(
        base_ms=statistics.median(spent["base"]),
        warm_ms=statistics.median(spent["warm"]),
        cold_ms=statistics.median(cold),
        cold_p99_ms=cold[min(len(cold) - 1, int(0.99 * len(cold)))],
        adapter_bytes=size,
    )


def format_beside(rows: Sequence[BesideLoaded]) -> str:
    lines = ["| streams without | adapters in memory | ms a step | without any | tokens, ratio | lowest, highest |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.streams} | {row.loaded} | {row.step_ms:.3f} | {row.without_ms:.3f} | {row.ratio:.3f} | "
            f"{row.lowest:.3f}, {row.highest:.3f} |"
        )
    return "\n".join(lines)


def format_tenants(rows: Sequence[ManyTenants]) -> str:
    lines = ["| streams | distinct | ms a step | base | added | MB read | at GB/s | times reading | lowest, highest |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.streams} | {row.distinct} | {row.step_ms:.3f} | {row.base_ms:.3f} | {row.added_ms:.3f} | "
            f"{row.bytes / 1e6:.1f} | {row.bandwidth / 1e9:.1f} | {row.ratio:.2f} | "
            f"{row.lowest:.2f}, {row.highest:.2f} |"
        )
    return "\n".join(lines)


def format_cold(found: ColdStart) -> str:
    return (
        f"first token of {PROMPT_TOKENS} tokens: {found.base_ms:.2f} ms without an adapter, {found.warm_ms:.2f} ms "
        f"with one in memory, {found.cold_ms:.2f} ms with one on disk (p99 {found.cold_p99_ms:.2f}), "
        f"{found.adapter_bytes / 1e6:.1f} MB each"
    )
