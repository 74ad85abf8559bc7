"""What metrics cost at 64 running requests: `pytest -s tests/server/test_metrics_cost.py` prints it.

In processor time of one thread, which others on the machine do not lengthen, against half of what a step takes of it:
two cores compute a step in no less.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dsc_serve.config import EngineConfig, LifeConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.admission import Permits
from dsc_serve.server.extensions import GenerationTimes
from dsc_serve.server.metrics.document import NewEngine
from dsc_serve.server.metrics.requests import Metrics
from dsc_serve.worker.messages import Delta, Stats, frame
from dsc_serve.worker.process import stats_of

pytestmark = pytest.mark.alone
RUNNING, ROUNDS, STEPS = 64, 5, 64  # a round holds a close look at a layer's routing, which every 64th step has
OUTPUT_TOKENS = 64  # so that in a step of 64 requests one ends
SCRAPE_S = 15.0
LIMIT = 0.03
CORES = 2


class Spent:
    """Seconds spent in some methods of an object, as long as it lives."""

    def __init__(self, owner: Any, *methods: str) -> None:
        self.seconds = 0.0
        for method in methods:
            setattr(owner, method, self._timed(getattr(owner, method)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.thread_time() - began

        return timed


class Reported:
    """Stands in for a StepReport, whose methods cannot be replaced."""

    def __init__(self, engine: Engine) -> None:
        self.add = engine.report.add


def seconds_of(call: Callable[[], object], times: int = 50) -> float:
    passed = []
    for _ in range(times):
        began = time.thread_time()
        call()
        passed.append(time.thread_time() - began)
    return statistics.median(passed)


def engine_at_work() -> Engine:
    config = EngineConfig(max_running=RUNNING, kv_tokens=RUNNING * 512, prefix_cache=False, threads=1)
    engine = Engine.for_model(prepare_model(config), config)
    params = SamplingParams(max_tokens=STEPS * (ROUNDS + 2), ignore_eos=True, temperature=0.8)
    for number in range(RUNNING):
        engine.add(str(number), [number + 1] * 8, params)
    for _ in range(STEPS):
        engine.step()
    assert len(engine.scheduler.running) == RUNNING
    return engine


def test_all_of_it_is_less_than_3_percent_of_a_step() -> None:
    engine = engine_at_work()
    stats = stats_of(engine, 0)
    ask_engine_s = seconds_of(lambda: frame(stats_of(engine, 0)))
    routing = Spent(engine.routing, "begin", "record")
    report: Any = Reported(engine)
    counts = Spent(report, "add")
    engine.report = report
    steps: list[float] = []
    parts: dict[str, list[float]] = {"routing": [], "step's counts": []}
    for _ in range(ROUNDS):
        routing.seconds = counts.seconds = 0.0
        began = time.thread_time()
        for _ in range(STEPS):
            engine.step()
        steps.append((time.thread_time() - began) / STEPS / CORES)
        parts["routing"].append(routing.seconds / STEPS)
        parts["step's counts"].append(counts.seconds / STEPS)
    step_s = statistics.median(steps)
    share = {name: median_ratio(spent, steps) for name, spent in parts.items()}
    metrics = Metrics(FedEngine(stats), Permits(1))
    share["tokens and ends at the HTTP edge"] = seconds_of(lambda: one_step(metrics)) / step_s
    share["looks of the supervisor"] = ask_engine_s / LifeConfig().ping_s
    scrape_s = seconds_of(lambda: asyncio.run(metrics.scrape(ready=True)))
    share["scrapes"] = (ask_engine_s + scrape_s) / SCRAPE_S
    print(f"\nA step at {RUNNING} running takes {1e3 * step_s:.2f} ms, a scrape {1e3 * scrape_s:.1f} ms")
    for name, part in share.items():
        print(f"{name:34} {part:7.2%} {1e6 * part * step_s:7.1f} µs per step")
    print(f"{'in all':34} {sum(share.values()):7.2%}")
    assert sum(share.values()) < LIMIT


class FedEngine(NewEngine):
    """Answers what it was given."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    async def stats(self, timeout_s: float = 1.0) -> Stats:
        return self._stats


def median_ratio(spent: Sequence[float], of: Sequence[float]) -> float:
    return statistics.median(part / whole for part, whole in zip(spent, of, strict=True))


CLOCKS = [GenerationTimes(first=0.0) for _ in range(RUNNING)]
DELTA = Delta("a", [1])


def one_step(metrics: Metrics) -> None:
    """What the HTTP edge counts of a step: a token for each request, and the end of one of them."""
    for clock in CLOCKS:
        passed = clock.record(DELTA, 0.004)
        assert passed is not None
        metrics.inter_token.observe(passed / len(DELTA.token_ids))
        metrics.generated_tokens += len(DELTA.token_ids)
    metrics.first_token.observe(0.02)
    metrics.generation_ended("length", 48, OUTPUT_TOKENS, 0.004)
    metrics.request_ended("/v1/completions", 200, 0.3)
