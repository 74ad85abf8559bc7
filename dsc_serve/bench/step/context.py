"""What context costs: bytes of keys and values for each token of it, and the time of steps that read them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from dsc_serve.bench.step.streams import Streams, closing, interleaved
from dsc_serve.config import EngineConfig
from dsc_serve.engine.kv_size import block_bytes
from dsc_serve.model.decoder import Decoder


class ContextRow(msgspec.Struct, frozen=True):
    """One system's streams with a context."""

    model: str
    kv_dtype: str
    streams: int
    context: int
    token_bytes: int  # that a token takes as long as every layer keeps it
    held_bytes: int  # that the context of one stream takes, behind whose windows nothing is kept
    step_ms: float
    ratio: float  # step_ms beside the first system's, the median of the rounds' own
    lowest: float
    highest: float
    bits_per_byte: float | None = None  # of a text in windows of the context; None: of none


class System(msgspec.Struct, frozen=True):
    """A model with keys and values of a dtype."""

    name: str
    model: Decoder
    config: EngineConfig
    bits_per_byte: float | None = None


def measure(systems: Sequence[System], streams: int, context: int, steps: int, rounds: int) -> list[ContextRow]:
    """Steps of all systems in turn, each of so many streams whose prompts fill the context."""
    running = [Streams(own.model, own.config, streams, context, steps * rounds) for own in systems]
    with closing(*running):
        for own in running:
            own.begin()
        pools = [own.engine.scheduler.pool for own in running]
        held = [(pool.total - pool.available) / streams for pool in pools]
        times = [interleaved(running, steps) for _ in range(rounds)]
    rows = []
    for i, (system, blocks) in enumerate(zip(systems, held, strict=True)):
        ratios = [spent[i] / spent[0] for spent in times]
        rows.append(
            ContextRow(
                model=system.name,
                kv_dtype=system.config.kv_dtype,
                streams=streams,
                context=context,
                token_bytes=system.model.kv_bytes(system.config.kv_dtype == "int8"),
                held_bytes=round(blocks * block_bytes(system.model, system.config)),
                step_ms=statistics.median(spent[i] for spent in times),
                ratio=statistics.median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                bits_per_byte=system.bits_per_byte,
            )
        )
    return rows


def format_rows(rows: Sequence[ContextRow]) -> str:
    names = ["model", "keys and values", "streams", "context", "bytes a token", "MB a stream", "ms a step", "ratio"]
    names.append("lowest, highest")
    told = any(row.bits_per_byte is not None for row in rows)
    names += ["bits per byte"] * told
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        lines.append(
            f"| {row.model} | {row.kv_dtype} | {row.streams} | {row.context} | {row.token_bytes:,} | "
            f"{row.held_bytes / 1e6:.2f} | {row.step_ms:.3f} | {row.ratio:.3f} | {row.lowest:.3f}, {row.highest:.3f} |"
            + f" {bits} |"
            * told
        )
    return "\n".join(lines)
