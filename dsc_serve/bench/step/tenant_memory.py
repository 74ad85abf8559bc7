"""What many tenants of a bank take in memory, and that all of them are served."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import msgspec

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.bench.step.streams import greedy, sized
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.machine import resident_bytes
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.graft import branch_bytes

PROMPT_TOKENS, TOKENS = 8, 4
RUNNING = 32  # at a time


class TenantMemory(msgspec.Struct, frozen=True):
    """So many tenants of a bank in memory together, each of whom was then asked for tokens."""

    tenants: int
    bytes: int  # of all
    bank_bytes: int  # of what they share, banks and routers
    resident_bytes: int  # what the process grew by when they were loaded
    load_ms: float  # of one
    rank: int  # of one LoRA beside them
    lora_bytes: int  # of that; 0: none was loaded
    tokens: int
    seconds: float  # that these tokens took
    evicted: int  # how many were put out of memory meanwhile


def served(engine: Engine, names: Sequence[str]) -> list[list[int]]:
    """The tokens of each; all are asked at once, with one prompt. Raises RuntimeError where one fails."""
    found: dict[str, list[int]] = {name: [] for name in names}
    prompt = [(31 * i + 7) % engine.capacity.vocab_size for i in range(PROMPT_TOKENS)]
    for name in names:
        engine.add(name, prompt, greedy(TOKENS), adapter=AdapterChoice.of(name))
    while engine.has_work or engine.arrivals:
        for delta in engine.step():
            if delta.error:
                raise RuntimeError(f"{delta.request_id}: {delta.error}")
            found[delta.request_id] += delta.token_ids
    return list(found.values())


def tenant_memory(
    model: Decoder, config: EngineConfig, names: Sequence[str], rank: int = 0, lora: str = ""
) -> TenantMemory:
    """Load all of these, and then ask each. config: with room for them. lora: an adapter of `rank` beside them."""
    tokens = RUNNING * (PROMPT_TOKENS + TOKENS + 2 * config.block_size)
    engine = Engine.for_model(model, sized(config, tokens, RUNNING))
    adapters = engine.arrivals.adapters
    assert adapters is not None
    try:
        gc.collect()  # what others have left, and would give back meanwhile
        before, began = resident_bytes(), time.perf_counter()
        engine.arrivals.check([AdapterChoice.of(name) for name in names], engine.step)
        load_ms = 1e3 * (time.perf_counter() - began) / len(names)
        grown, size = resident_bytes() - before, adapters.nbytes
        began = time.perf_counter()
        answers = served(engine, names)
        seconds = time.perf_counter() - began
        assert adapters.in_memory == len(names)
        if lora:
            engine.arrivals.check([AdapterChoice.of(lora)], engine.step)
        return TenantMemory(
            tenants=len(names),
            bytes=size,
            bank_bytes=branch_bytes(model.config, model.dtype.itemsize)[0],
            resident_bytes=grown,
            load_ms=load_ms,
            rank=rank,
            lora_bytes=adapters.nbytes - size,
            tokens=sum(map(len, answers)),
            seconds=seconds,
            evicted=adapters.counts.evictions,
        )
    finally:
        engine.close()


def format_memory(found: TenantMemory) -> str:
    each, all_of_them = found.bytes / found.tenants, found.bytes + found.bank_bytes
    lines = [
        f"{found.tenants:,} tenants in memory: {found.bytes / 1e6:.1f} MB, {each / 1e6:.3f} MB each (the process grew "
        f"by {found.resident_bytes / 1e6:.1f} MB, {found.load_ms:.1f} ms to load one); with bank and routers, "
        f"{found.bank_bytes / 1e6:.1f} MB once for all, {all_of_them / 1e6:.1f} MB."
    ]
    if found.lora_bytes:
        many = found.tenants * found.lora_bytes
        lines.append(
            f"A LoRA of rank {found.rank} takes {found.lora_bytes / 1e6:.2f} MB: as many, {many / 1e6:,.0f} MB, "
            f"{many / all_of_them:.0f} times as much."
        )
    lines.append(
        f"Asked all at once, each got its {TOKENS} tokens: {found.tokens:,} in {found.seconds:.1f} s, "
        f"{found.evicted} put out of memory."
    )
    return "\n".join(lines)
