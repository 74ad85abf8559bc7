"""Kinds of adapters beside each other: what a step costs with tenants of each, and what they take in memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from dsc_kernels.weights import Pair
from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.bench.step.adapters import PROMPT_TOKENS, SIZE, most_bytes, write_random
from dsc_serve.bench.step.streams import Streams, closing, interleaved
from dsc_serve.config import EngineConfig
from dsc_serve.files import CheckpointError
from dsc_serve.machine import resident_bytes
from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.cores.files import write_basis, write_cores
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.peft.modules import Base

DRAWN = 4  # kinds of random numbers; content tells tenants apart by a factor


class KindCost(msgspec.Struct, frozen=True):
    """Streams that have an adapter of a kind each, beside as many without and of other kinds, step by step in turn."""

    kind: str
    rank: int
    streams: int
    step_ms: float
    base_ms: float
    share: float  # of a step's time that is added, the median of the rounds' own
    lowest: float  # of the rounds' shares
    highest: float  # likewise
    bytes: int  # of the distinct adapters and bases that a step reads


class KindMemory(msgspec.Struct, frozen=True):
    """So many adapters of a kind in memory."""

    kind: str
    rank: int
    adapters: int
    bytes: int  # of all
    shared_bytes: int  # of them what all share
    resident_bytes: int  # what the process grew by
    load_ms: float  # of one


def write_kind(model: Decoder, folder: Path, kind: str, count: int, rank: int) -> list[str]:
    """Write so many adapters of a kind, of all modules and random; returns their names.

    Raises CheckpointError where the model has no module that can be adapted.
    """
    if kind == "lora":
        return write_random(model, folder, count, rank)
    modules = Base(model.config, model.origin).modules
    if not modules:
        raise CheckpointError("no module of the model can be adapted")
    g = torch.Generator().manual_seed(0)
    pairs = {
        own.name: Pair(torch.randn(rank, own.into, generator=g), SIZE * torch.randn(own.out, rank, generator=g))
        for own in modules.values()
    }
    basis = write_basis(folder, pairs, kind, "bench"), kind, "bench"
    drawn = [{name: SIZE * torch.randn(rank, rank, generator=g) for name in modules} for _ in range(min(count, DRAWN))]
    names = [f"{kind}-{i:04d}" for i in range(count)]
    for i, name in enumerate(names):
        factor = 1 + i / 1e6
        write_cores(folder / name, basis, {own: factor * core for own, core in drawn[i % DRAWN].items()})
    return names


def room_for(model: Decoder, kind: str, count: int, rank: int) -> int:
    """Bytes that so many take at most: panels are padded."""
    if kind == "lora":
        return count * most_bytes(model, rank)
    core = (rank + 16) * (rank + 16) * model.dtype.itemsize + 4 * (rank + 16) + 128
    return most_bytes(model, rank) + count * core * len(module_shapes(model.config))


def compare(
    model: Decoder,
    config: EngineConfig,
    names: Mapping[str, Sequence[str]],
    ranks: Mapping[str, int],
    streams: int,
    steps: int,
    rounds: int,
) -> list[KindCost]:
    """Steps of streams without adapters and of each kind, in turn; names: of the kinds' adapters."""
    base, *tenants = (Streams(model, config, streams, PROMPT_TOKENS, steps * rounds) for _ in range(1 + len(names)))
    sizes = []
    with closing(base, *tenants):
        base.begin([None])
        for own, kind in zip(tenants, names.values(), strict=True):
            own.begin([AdapterChoice.of(name) for name in kind[:streams]])
            report, counters = own.engine.adapter_report, own.engine.counters
            before = report.read_bytes, counters.steps
            own.step()
            sizes.append((report.read_bytes - before[0]) // (counters.steps - before[1]))
        times = [interleaved([base, *tenants], steps) for _ in range(rounds)]
    found = []
    for i, kind in enumerate(names):
        shares = [spent[1 + i] / spent[0] - 1 for spent in times]
        found.append(
            KindCost(
                kind=kind,
                rank=ranks[kind],
                streams=streams,
                step_ms=statistics.median(spent[1 + i] for spent in times),
                base_ms=statistics.median(spent[0] for spent in times),
                share=statistics.median(shares),
                lowest=min(shares),
                highest=max(shares),
                bytes=sizes[i],
            )
        )
    return found


def in_memory(model: Decoder, config: EngineConfig, kind: str, names: Sequence[str], rank: int) -> KindMemory:
    """Load all of these in an engine of their own, and compute a token with the last."""
    streams = Streams(model, config, 1, PROMPT_TOKENS, 1)
    with closing(streams):
        gc.collect()  # what other engines have left, and would give back meanwhile
        before, began = resident_bytes(), time.perf_counter()
        streams.engine.arrivals.check([AdapterChoice.of(name) for name in names], streams.engine.step)
        spent = 1e3 * (time.perf_counter() - began)
        grown = resident_bytes() - before
        streams.begin([AdapterChoice.of(names[-1])])
        adapters = streams.engine.arrivals.adapters
        assert adapters is not None and adapters.in_memory == len(names)
        return KindMemory(
            kind=kind,
            rank=rank,
            adapters=len(names),
            bytes=adapters.nbytes,
            shared_bytes=adapters.nbytes - sum(entry.nbytes for entry in adapters.held),
            resident_bytes=grown,
            load_ms=spent / len(names),
        )


def format_costs(rows: Sequence[KindCost]) -> str:
    lines = ["| streams, as many tenants | kind | rank | ms a step | base | added | lowest, highest | MB read a step |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.streams} | {row.kind} | {row.rank} | {row.step_ms:.3f} | {row.base_ms:.3f} | {row.share:+.1%} | "
            f"{row.lowest:+.1%}, {row.highest:+.1%} | {row.bytes / 1e6:.2f} |"
        )
    return "\n".join(lines)


def format_memory(rows: Sequence[KindMemory]) -> str:
    lines = [
        "| kind | rank | adapters in memory | MB | of that shared | MB each | process grew by MB | ms to load one |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        own = (row.bytes - row.shared_bytes) / row.adapters
        lines.append(
            f"| {row.kind} | {row.rank} | {row.adapters} | {row.bytes / 1e6:.1f} | {row.shared_bytes / 1e6:.1f} | "
            f"{own / 1e6:.3f} | {row.resident_bytes / 1e6:.1f} | {row.load_ms:.1f} |"
        )
    return "\n".join(lines)
