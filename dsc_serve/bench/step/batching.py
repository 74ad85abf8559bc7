"""How batches are formed and what that is worth: policies and grouping side by side on one model, as it really routes.

Requests all arrive at once, `oversubscription` times as many as may run, so that a policy has a choice. Every variant
gets the same prompts and computes with the same model; latencies are of the engine itself, without HTTP.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsc_kernels.plan import Mode, Planner
from dsc_serve.bench.machine import dated_machine
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.sampling_params import SamplingParams

VARIANTS: tuple[tuple[str, Mode], ...] = (("fcfs", "off"), ("affinity", "off"), ("fcfs", "always"), ("fcfs", "auto"))
KEPT_SHARES = (0.05, 0.1, 0.25, 0.5)
LEARNT = 0.2  # of a trace, from which the hot atoms of the static cache are taken

Picks = NDArray[np.int32]


class BatchingError(ValueError):
    """A benchmark that cannot be run as asked; one line that says why."""


@dataclass(frozen=True)
class BatchingBench:
    """Queues of requests under several policies and groupings; the tables hold medians."""

    model: str
    requests: tuple[int, ...] = (8, 32, 128)  # how many may run at once, one table for each
    oversubscription: int = 4
    prompt_tokens: int = 48
    output_tokens: int = 48
    # prompts are cut from so many places of the text, in turn, so that neighbours in the queue differ; 0: each from a
    # place of its own
    topics: int = 8
    repeats: int = 5  # of all variants in turn
    threads: int = 0
    seed: int = 0


@dataclass(frozen=True)
class BatchingRow:
    """One variant at one number of requests. Bytes per token: each row of a step once. Times in milliseconds."""

    policy: str
    grouping: str
    running: int
    steps: int
    distinct: float  # different atoms of a step and layer, mean
    arrival: float | None  # ρ of 16-token tiles in steps of at least 16 tokens
    grouped: float | None  # likewise, once tokens are grouped
    grouped_tiles: int
    bank_bytes_per_token: float
    router_bytes_per_token: float
    step_ms: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


@dataclass(frozen=True)
class CacheRow:
    """What if only `kept` of the atoms were in fast memory: the share of picked rows found there, each row of a step
    once."""

    policy: str
    running: int
    kept: float
    hot: float  # where it holds those that the first fifth of the trace picked most
    recent: float  # where it holds those used last


@dataclass
class BatchingResult:
    machine: dict[str, object]
    model: dict[str, object]
    rows: list[BatchingRow] = field(default_factory=list)
    caches: list[CacheRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def cut_prompts(tokens: Sequence[int], bench: BatchingBench, count: int) -> list[list[int]]:
    """`count` different pieces of the text; with topics, topic i's pieces follow each other in the text."""
    length, each = bench.prompt_tokens, -(-count // max(1, bench.topics))
    needed = length * (each * bench.topics if bench.topics else count)
    if len(tokens) < needed:
        raise BatchingError(f"the text has {len(tokens)} tokens; {count} prompts of {length} need {needed}")
    starts = list(range(0, len(tokens) - length + 1, length))
    shuffler = random.Random(bench.seed)
    if not bench.topics:
        return [list(tokens[start : start + length]) for start in shuffler.sample(starts, count)]
    stretch = len(starts) // bench.topics
    firsts = [i * stretch + shuffler.randrange(stretch - each + 1) for i in range(bench.topics)]
    order = [firsts[i % bench.topics] + i // bench.topics for i in range(count)]
    return [list(tokens[starts[at] : starts[at] + length]) for at in order]


def run_batching(
    bench: BatchingBench, tokens: Sequence[int] | None, report: Callable[[str], None] = lambda line: None
) -> BatchingResult:
    """Measure all variants; tokens: of the text, None for random ids."""
    config = EngineConfig(model=bench.model, threads=bench.threads, prefix_cache=False)
    model = prepare_model(config)
    layers = dsc_layers(model)
    if not layers:
        raise BatchingError(f"model {bench.model} has no DSC layer: there are no atoms to share")
    result = BatchingResult(dated_machine(), asdict(layers[0].shape))
    result.model |= {"dtype": str(layers[0].shape.dtype), "layers": len(layers)}
    for running in bench.requests:
        count = running * bench.oversubscription
        if tokens is None:
            source = random.Random(bench.seed)
            prompts = [
                [source.randrange(model.config.vocab_size) for _ in range(bench.prompt_tokens)] for _ in range(count)
            ]
        else:
            prompts = cut_prompts(tokens, bench, count)
        measured: dict[tuple[str, Mode], list[BatchingRow]] = {variant: [] for variant in VARIANTS}
        traces = {}
        for repeat in range(bench.repeats):
            for policy, grouping in (*VARIANTS[repeat % len(VARIANTS) :], *VARIANTS[: repeat % len(VARIANTS)]):
                report(f"{running} requests, {policy}, grouping {grouping}")
                row, trace = measure(model, config, policy, grouping, running, prompts, bench.output_tokens)
                measured[policy, grouping].append(row)
                traces[policy, grouping] = trace
        result.rows += [medians(rows) for rows in measured.values()]
        for (policy, grouping), trace in traces.items():
            if grouping == "off":
                result.caches += [
                    cache_row(trace, policy, running, kept, layers[0].shape.atoms) for kept in KEPT_SHARES
                ]
    return result


def measure(
    model: Decoder,
    config: EngineConfig,
    policy: str,
    grouping: Mode,
    running: int,
    prompts: list[list[int]],
    output: int,
) -> tuple[BatchingRow, list[list[Picks]]]:
    """One variant, and its trace: the different atoms of each step and layer."""
    for layer in dsc_layers(model):
        assert layer.planner is not None
        layer.planner = Planner(grouping, layer.shape, layer.planner.constants)
    config = msgspec.structs.replace(
        config,
        policy=policy,
        max_running=running,
        step_tokens=max(512, running),
        kv_tokens=running * 4 * len(prompts[0]),
    )
    engine = Engine.for_model(model, config)
    watch = engine.routing
    assert watch is not None
    seen: list[Picks] = []
    warm(engine, prompts[0])
    watch.on_picks = seen.append
    before = watch.report()
    params = SamplingParams(max_tokens=output, temperature=0.8, ignore_eos=True, seed=1)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    started, steps = time.perf_counter(), []
    stamps: dict[str, list[float]] = {}
    while engine.has_work:
        begun = time.perf_counter()
        deltas = engine.step()
        now = time.perf_counter()
        steps.append(now - begun)
        for delta in deltas:
            stamps.setdefault(delta.request_id, []).append(now - started)
    took = time.perf_counter() - started
    watch.on_picks = None
    after = watch.report()
    tokens, watched = after.tokens - before.tokens, after.steps - before.steps
    distinct = sum(a.distinct - b.distinct for a, b in zip(after.layers, before.layers, strict=True))
    large = [layer for layer in after.layers if layer.arrival < 1]
    ttft = [1e3 * times[0] for times in stamps.values()]
    itl = [1e3 * gap for times in stamps.values() for gap in np.diff(times)]
    return BatchingRow(
        policy=policy,
        grouping=grouping,
        running=running,
        steps=len(steps),
        distinct=distinct / watched / len(after.layers),
        arrival=mean([layer.arrival for layer in large]),
        grouped=mean([layer.grouped for layer in large]),
        grouped_tiles=sum(layer.grouped_tiles for layer in after.layers),
        bank_bytes_per_token=(after.bank_bytes - before.bank_bytes) / tokens,
        router_bytes_per_token=(after.router_bytes - before.router_bytes) / tokens,
        step_ms=1e3 * float(np.median(steps)),
        tokens_per_s=len(prompts) * output / took,
        ttft_p50_ms=float(np.percentile(ttft, 50)),
        ttft_p99_ms=float(np.percentile(ttft, 99)),
        itl_p50_ms=float(np.percentile(itl, 50)),
        itl_p99_ms=float(np.percentile(itl, 99)),
    ), [[np.unique(layer) for layer in step] for step in seen]


def warm(engine: Engine, prompt: list[int]) -> None:
    engine.add("warm", prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    while engine.has_work:
        engine.step()


def medians(rows: Sequence[BatchingRow]) -> BatchingRow:
    """Of every figure, over the repeats of one variant."""
    figures: dict[str, Any] = {}
    for name, value in asdict(rows[0]).items():
        if isinstance(value, float):
            figures[name] = float(np.median([getattr(row, name) for row in rows]))
    return replace(rows[0], **figures)


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def cache_row(trace: Sequence[Sequence[Picks]], policy: str, running: int, kept: float, atoms: int) -> CacheRow:
    size = max(1, round(kept * atoms))
    return CacheRow(policy, running, kept, hot_hits(trace, size), recent_hits(trace, size))


def hot_hits(trace: Sequence[Sequence[Picks]], size: int) -> float:
    """The share of rows found where each layer keeps the `size` atoms that most of the trace's first steps picked."""
    learnt = max(1, round(LEARNT * len(trace)))
    hits = total = 0
    for layer in range(len(trace[0])):
        counts = np.bincount(np.concatenate([step[layer] for step in trace[:learnt]]))
        hot = np.argsort(-counts, kind="stable")[:size]
        for step in trace[learnt:]:
            hits += int(np.isin(step[layer], hot).sum())
            total += len(step[layer])
    return hits / total if total else 0.0


def recent_hits(trace: Sequence[Sequence[Picks]], size: int) -> float:
    """The share of rows found where each layer keeps the `size` atoms used last; of a step, all rows count once."""
    learnt = max(1, round(LEARNT * len(trace)))
    hits = total = 0
    for layer in range(len(trace[0])):
        held: OrderedDict[int, None] = OrderedDict()
        for number, step in enumerate(trace):
            found = [atom for atom in step[layer].tolist() if atom in held]
            if number >= learnt:
                hits, total = hits + len(found), total + len(step[layer])
            for atom in step[layer].tolist():
                held[atom] = None
                held.move_to_end(atom)
            while len(held) > size:
                held.popitem(last=False)
    return hits / total if total else 0.0


def format_batching(result: BatchingResult) -> str:
    """Both tables in Markdown."""
    lines = [
        "| running | policy | grouping | atoms | ρ as they come | ρ grouped | bank KB/token | step ms | tokens/s "
        "| TTFT p50, p99 ms | ITL p50, p99 ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        rhos = " | ".join("–" if value is None else f"{value:.2f}" for value in (row.arrival, row.grouped))
        tiles = f" ({row.grouped_tiles} tiles)" if row.grouping == "auto" else ""
        lines.append(
            f"| {row.running} | {row.policy} | {row.grouping}{tiles} | {row.distinct:.0f} | {rhos} "
            f"| {row.bank_bytes_per_token / 1e3:.1f} | {row.step_ms:.2f} | {row.tokens_per_s:.0f} "
            f"| {row.ttft_p50_ms:.0f}, {row.ttft_p99_ms:.0f} | {row.itl_p50_ms:.1f}, {row.itl_p99_ms:.1f} |"
        )
    shares = sorted({row.kept for row in result.caches})
    lines += ["", "| running | policy | cache | " + " | ".join(f"{share:.0%} kept" for share in shares) + " |"]
    lines.append("|---" * (3 + len(shares)) + "|")
    for running, policy in dict.fromkeys((row.running, row.policy) for row in result.caches):
        own = [row for row in result.caches if (row.running, row.policy) == (running, policy)]
        for name in ("hot", "recent"):
            cells = " | ".join(f"{getattr(row, name):.0%}" for row in sorted(own, key=lambda row: row.kept))
            lines.append(f"| {running} | {policy} | {name} | {cells} |")
    return "\n".join(lines)
