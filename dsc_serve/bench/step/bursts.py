"""Prompts that come at once, under several policies: engines of one model in this process, which are driven in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from dsc_serve.bench.compare.findings import EVEN
from dsc_serve.bench.compare.results import Ratio
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams

SETTLED = 16  # steps that those beside a burst may take beyond its answers
FIGURES = {"ttft_p50_ms": False, "ttft_p99_ms": False, "tokens_per_s": True}  # whether more is better


class BurstBench(msgspec.Struct, frozen=True, kw_only=True):
    """Bursts of prompts, with and without requests that decode when they come."""

    policies: tuple[str, ...] = ("fcfs", "bursts")
    bursts: tuple[int, ...] = (8, 32)  # sizes
    beside: tuple[int, ...] = (0, 4)  # requests that decode when a burst comes
    prompt_tokens: int = 48
    output_tokens: int = 64
    apart_ms: float = 0.2  # between its prompts, as HTTP brings them
    waves: int = 3  # bursts of a round, each once the last has been answered
    rounds: int = 5  # that count; one before does not
    seed: int = 0


class BurstRow(msgspec.Struct, frozen=True, kw_only=True):
    """One round under one policy."""

    policy: str
    burst: int
    beside: int
    round: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float  # between all tokens, of those beside too
    itl_p90_ms: float
    itl_p99_ms: float
    largest_ms: float  # the longest of these
    tokens_per_s: float


class BurstEngine:
    """An engine under one policy that takes bursts and tells when tokens came."""

    def __init__(self, model: Decoder, config: EngineConfig, bench: BurstBench, policy: str) -> None:
        most = max(bench.bursts) + max(bench.beside)
        each = bench.prompt_tokens + bench.output_tokens + max(bench.bursts) + SETTLED + 2 * config.block_size
        running = max(config.max_running, most)
        self.bench = bench
        self.engine = Engine.for_model(
            model,
            msgspec.structs.replace(
                config,
                policy=policy,
                kv_tokens=most * each,
                max_running=running,
                step_tokens=max(config.step_tokens, running),
                prefix_cache=False,
            ),
        )
        self._rng, self._count = random.Random(bench.seed), 0

    def measured(self, policy: str, burst: int, beside: int, number: int) -> BurstRow:
        first, gaps, tokens, seconds = list[float](), list[float](), 0, 0.0
        for _ in range(self.bench.waves):
            due, stamps, took = self._wave(burst, beside)
            first += [1e3 * (stamps[name][0] - at) for name, at in due.items()]
            gaps += [1e3 * float(gap) for own in stamps.values() for gap in np.diff(own)]
            tokens, seconds = tokens + sum(len(stamps[name]) for name in due), seconds + took
        return BurstRow(
            policy=policy,
            burst=burst,
            beside=beside,
            round=number,
            ttft_p50_ms=percentile(first, 50),
            ttft_p99_ms=percentile(first, 99),
            itl_p50_ms=percentile(gaps, 50),
            itl_p90_ms=percentile(gaps, 90),
            itl_p99_ms=percentile(gaps, 99),
            largest_ms=max(gaps),
            tokens_per_s=tokens / seconds,
        )

    def _wave(self, burst: int, beside: int) -> tuple[dict[str, float], dict[str, list[float]], float]:
        """When each of a burst was due, and the times of all tokens that came from its first one's on; seconds."""
        engine, output = self.engine, self.bench.output_tokens
        others = [self._add(output + burst + SETTLED) for _ in range(beside)]
        while engine.scheduler.waiting or any(r.num_uncomputed > 1 for r in engine.scheduler.running.values()):
            engine.step()
        began = time.perf_counter()
        due = [began + 1e-3 * self.bench.apart_ms * i for i in range(burst)]
        arrived: dict[str, float] = {}
        stamps: dict[str, list[float]] = {}
        left = burst
        while left:
            now = time.perf_counter()
            while len(arrived) < burst and due[len(arrived)] <= now:
                at = due[len(arrived)]
                arrived[self._add(output)] = at
            if not engine.has_work:
                time.sleep(max(0.0, due[len(arrived)] - now))
                continue
            for delta in engine.step():
                if delta.error:
                    raise RuntimeError(delta.error)
                at = time.perf_counter()
                stamps.setdefault(delta.request_id, []).extend([at] * len(delta.token_ids))
                left -= delta.finish_reason is not None and delta.request_id in arrived
        took = time.perf_counter() - began
        for name in others:
            engine.finish(name)
        return arrived, stamps, took

    def _add(self, output: int) -> str:
        self._count += 1
        vocabulary = self.engine.capacity.vocab_size
        prompt = [self._rng.randrange(vocabulary) for _ in range(self.bench.prompt_tokens)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        return self.engine.add(str(self._count), prompt, params).id


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def run_bursts(
    model: Decoder, config: EngineConfig, bench: BurstBench, report: Callable[[str], None] = lambda line: None
) -> list[BurstRow]:
    """All policies in turn in every round, another one first in each."""
    rows, policies = [], bench.policies
    for burst in bench.bursts:
        for beside in bench.beside:
            engines = {policy: BurstEngine(model, config, bench, policy) for policy in policies}
            for number in range(bench.rounds + 1):
                report(f"{burst} at once beside {beside}, round {number} of {bench.rounds}")
                for i in range(len(policies)):
                    policy = policies[(number + i) % len(policies)]
                    row = engines[policy].measured(policy, burst, beside, number)
                    rows += [row] if number else []
            for engine in engines.values():
                engine.engine.close()
    return rows


def ratio(rows: Sequence[BurstRow], policy: str, against: str, burst: int, beside: int, figure: str) -> Ratio:
    """Of two policies' figures, round by round."""

    def by_round(name: str) -> dict[int, float]:
        own = [row for row in rows if (row.policy, row.burst, row.beside) == (name, burst, beside)]
        return {row.round: getattr(row, figure) for row in own}

    one, other = by_round(policy), by_round(against)
    return Ratio.of([one[number] / other[number] for number in one])


def told_ratio(found: Ratio, more_is_better: bool) -> str:
    """The median of the rounds with their ends; where these lie on both sides of 1, or near it, no difference."""
    if found.rounds < 2:
        return f"{found.median:.2f}, one round"
    if abs(found.median - 1) <= EVEN or found.low <= 1 <= found.high:
        return f"no difference ({found.low:.2f} to {found.high:.2f})"
    better = "better" if (found.median > 1) == more_is_better else "worse"
    return f"{found.median:.2f}, {better} ({found.low:.2f} to {found.high:.2f})"


def format_bursts(rows: Sequence[BurstRow], bench: BurstBench) -> str:
    """Medians over rounds, and every policy's ratios to the first one's, in Markdown."""
    base, *others = bench.policies
    lines = ["| at once | beside | policy | TTFT p50, p99 ms | ITL p50, p90, p99, largest ms | tokens/s |"]
    lines.append("|---" * 6 + "|")
    points = [(burst, beside) for burst in bench.bursts for beside in bench.beside]
    for burst, beside in points:
        for policy in bench.policies:
            own = [row for row in rows if (row.policy, row.burst, row.beside) == (policy, burst, beside)]
            medians = {name: float(np.median([getattr(row, name) for row in own])) for name in TOLD}
            first = f"{medians['ttft_p50_ms']:.1f}, {medians['ttft_p99_ms']:.1f}"
            between = ", ".join(f"{medians[name]:.1f}" for name in TOLD[2:6])
            lines.append(f"| {burst} | {beside} | {policy} | {first} | {between} | {medians['tokens_per_s']:,.0f} |")
    if others:
        lines += ["", "| at once | beside | policies | TTFT p50 | TTFT p99 | tokens/s |", "|---" * 6 + "|"]
    for burst, beside in points:
        for policy in others:
            cells = [told_ratio(ratio(rows, policy, base, burst, beside, name), more) for name, more in FIGURES.items()]
            lines.append(f"| {burst} | {beside} | {policy} / {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


TOLD = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "largest_ms", "tokens_per_s")
