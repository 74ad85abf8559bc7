"""The engine in this process: what a long prompt does to running requests, and what the prefix cache saves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams

WARM_STEPS = 30
DECODED = 1000  # tokens of a request that decodes, at most


class LongPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds between the tokens of `streams` requests while a prompt of `tokens` is computed, and without it."""

    streams: int
    tokens: int
    quiet_median_ms: float  # of the same steps of like requests, whose contexts are as long, without the prompt
    quiet_p99_ms: float
    beside_median_ms: float
    beside_p99_ms: float
    ttft_ms: float
    steps: int

    @property
    def p99_ratio(self) -> float:
        return self.beside_p99_ms / self.quiet_p99_ms


class SharedPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """Median time to the first token of requests that share a system prompt, without and with the prefix cache."""

    system_tokens: int
    own_tokens: int
    hit_rate: float
    ttft_without_ms: float
    ttft_with_ms: float


def format_prompts(long: LongPrompt, shared: SharedPrefix) -> str:
    """Three lines for people."""
    return (
        f"{long.streams} requests decode: a token every {long.quiet_median_ms:.2f} ms (p99 {long.quiet_p99_ms:.2f})\n"
        f"while a prompt of {long.tokens} tokens is computed: {long.beside_median_ms:.2f} ms (p99 "
        f"{long.beside_p99_ms:.2f}, {long.p99_ratio:.2f} times); its first token after {long.ttft_ms:.0f} ms\n"
        f"requests that share {shared.system_tokens} tokens and add {shared.own_tokens}: first token after "
        f"{shared.ttft_without_ms:.2f} ms without, {shared.ttft_with_ms:.2f} ms with the prefix cache "
        f"(hit rate {shared.hit_rate:.1%})"
    )


class Harness:
    """One engine around a loaded model, driven step by step with random tokens."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.engine = Engine.for_model(model, config)
        self._rng = np.random.default_rng(0)
        self._count = 0

    def prompt(self, tokens: int) -> list[int]:
        return [int(token) for token in self._rng.integers(0, self.engine.capacity.vocab_size, tokens)]

    def add(self, prompt: list[int], max_tokens: int) -> str:
        self._count += 1
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return self.engine.add(str(self._count), prompt, params).id

    def step(self) -> tuple[float, set[str]]:
        """Milliseconds of a step, and which requests got a token."""
        start = time.perf_counter()
        deltas = self.engine.step()
        return 1e3 * (time.perf_counter() - start), {delta.request_id for delta in deltas if delta.token_ids}

    def decode(self, streams: int) -> None:
        """Begin so many requests that decode from then on."""
        for _ in range(streams):
            self.add(self.prompt(48), DECODED - 48)
        for _ in range(WARM_STEPS):
            self.step()

    def clear(self) -> None:
        scheduler = self.engine.scheduler
        for request_id in [*scheduler.running, *scheduler.waiting]:
            self.engine.finish(request_id)


def long_prompt(harness: Harness, streams: int, tokens: int, rounds: int) -> LongPrompt:
    """Let a long prompt arrive while `streams` requests decode; each round then takes as many steps without one."""
    quiet: list[float] = []
    beside: list[float] = []
    ttft: list[float] = []
    for round_ in range(rounds + 1):  # the first, in which the engine learns what its steps take, is not counted
        harness.decode(streams)
        long = harness.add(harness.prompt(tokens), 2)
        during = []
        arrived: set[str] = set()
        while long not in arrived:
            ms, arrived = harness.step()
            during.append(ms)
        harness.clear()
        harness.decode(streams)
        without = [harness.step()[0] for _ in during]
        harness.clear()
        if round_:
            quiet, beside, ttft = [*quiet, *without], [*beside, *during], [*ttft, sum(during)]
    return LongPrompt(
        streams=streams,
        tokens=tokens,
        quiet_median_ms=percentile(quiet, 50),
        quiet_p99_ms=percentile(quiet, 99),
        beside_median_ms=percentile(beside, 50),
        beside_p99_ms=percentile(beside, 99),
        ttft_ms=percentile(ttft, 50),
        steps=len(beside) // rounds,
    )


def shared_prefix(
    without: Harness, cached: Harness, system_tokens: int, own_tokens: int, requests: int
) -> SharedPrefix:
    """Send requests one after another, in turn to an engine without and one with the prefix cache."""
    system = cached.prompt(system_tokens)
    times: dict[Harness, list[float]] = {without: [], cached: []}
    for harness in times:
        harness.add(system + harness.prompt(own_tokens), 1)
        harness.step()
        while harness.engine.has_work:
            harness.step()
    scheduler = cached.engine.scheduler
    asked, found = scheduler.prompt_tokens, scheduler.cached_tokens
    for _ in range(requests):
        own = cached.prompt(own_tokens)
        for harness, spent in times.items():
            harness.add(system + own, 1)
            spent.append(0.0)
            while harness.engine.has_work:
                spent[-1] += harness.step()[0]
    return SharedPrefix(
        system_tokens=system_tokens,
        own_tokens=own_tokens,
        hit_rate=(scheduler.cached_tokens - found) / (scheduler.prompt_tokens - asked),
        ttft_without_ms=percentile(times[without], 50),
        ttft_with_ms=percentile(times[cached], 50),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3)
