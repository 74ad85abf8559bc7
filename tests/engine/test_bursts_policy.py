"""Prompts that come together: they are heard sooner than under fcfs, nothing is lost by it, and bounds are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from support.fake_runner import fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.policies.bursts import LONGEST_MS, LONGEST_STEPS
from dsc_serve.engine.policies.plan_builder import LEAST_CHUNK, QUIET_STEPS, SHORT_MS
from dsc_serve.engine.step_time import Estimate
from dsc_serve.sampling_params import SamplingParams

COSTS = Estimate(step=1.5, single=0.1, token=0.05)  # milliseconds, about what the paper's sizes cost
APART_S = 0.0002


@dataclass
class Simulated:
    """An engine whose clock moves by what each step costs. first, gaps: seconds of those that came at once, and
    between all tokens; beside: between those of requests that ran before; steps: milliseconds, singles and prompt
    tokens of each step."""

    engine: Engine
    now: float = 0.0
    last: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    steps: list[tuple[float, int, int]] = field(default_factory=list)

    def step(self) -> None:
        estimate, load = self.engine.scheduler.budget.estimate or COSTS, self.engine.scheduler.plan().load
        ms = estimate.ms(load)
        self.steps.append((ms, load.singles, load.tokens))
        deltas = self.engine.step()
        self.now += 1e-3 * ms
        for delta in deltas:
            name = delta.request_id
            if name in self.last:
                self.gaps.append(self.now - self.last[name])
                if name.startswith("r"):
                    self.beside.append(self.gaps[-1])
            else:
                self.first[name] = self.now
            self.last[name] = self.now

    def add(self, name: str, prompt: int, output: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        self.engine.add(name, [1 + len(name)] * prompt, params)

    def burst(self, count: int, prompt: int = 48, output: int = 12) -> float:
        """Seconds until all of a burst are answered; their first tokens count from when each was due."""
        begun, sent = self.now, 0
        due = [begun + i * APART_S for i in range(count)]
        ends = {f"b{i}" for i in range(count)}
        while sent < count or ends & (self.engine.scheduler.running.keys() | set(self.engine.scheduler.waiting)):
            while sent < count and due[sent] <= self.now:
                self.add(f"b{sent}", prompt, output)
                sent += 1
            if not self.engine.has_work:
                self.now = due[sent]
                continue
            self.step()
        for i in range(count):
            self.first[f"b{i}"] -= due[i]
        return self.now - begun


def simulated(policy: str, **options: Any) -> Simulated:
    settings = {"blocks": 2000, "step_tokens": 512, "max_running": 80, "context": 900, "prefix_cache": False} | options
    made = Simulated(fake_engine(policy=policy, estimate=COSTS, **settings))
    made.engine.scheduler.clock = lambda: made.now
    return made


def beside(policy: str, count: int, **options: Any) -> Simulated:
    """With so many requests that decode."""
    made = simulated(policy, **options)
    for i in range(count):
        made.add(f"r{i}", 4, 300)
    for _ in range(3):
        made.step()
    for seen in (made.steps, made.gaps, made.beside):
        seen.clear()
    return made


def percentile(values: Iterable[float], percent: float) -> float:
    return float(np.percentile(list(values), percent))


@pytest.mark.parametrize(("count", "running", "most"), [(8, 0, 0.9), (8, 4, 0.9), (32, 0, 0.7), (32, 4, 0.65)])
def test_prompts_that_come_together_are_heard_sooner_and_answered_sooner(count: int, running: int, most: float) -> None:
    p99, took = {}, {}
    for policy in ("fcfs", "bursts"):
        made = beside(policy, running)
        took[policy] = made.burst(count)
        p99[policy] = float(np.percentile([made.first[f"b{i}"] for i in range(count)], 99))
    assert p99["bursts"] < most * p99["fcfs"], p99
    assert took["bursts"] < took["fcfs"], took


@pytest.mark.parametrize(("count", "running", "sooner"), [(8, 4, 0.9), (8, 16, 0.95), (32, 4, 0.6), (32, 16, 0.6)])
def test_what_running_requests_lose_to_a_burst_is_no_more_in_all_and_bounded_at_once(
    count: int, running: int, sooner: float
) -> None:
    """A prompt costs what it costs: protection spreads that over more of their tokens, for which a burst waits."""
    first, median, largest, done = (dict[str, float]() for _ in range(4))
    for policy in ("fcfs", "bursts"):
        made = beside(policy, running)
        begun = made.now
        made.burst(count, output=64)
        first[policy] = percentile((made.first[f"b{i}"] for i in range(count)), 99)
        largest[policy], median[policy] = max(made.beside), percentile(made.beside, 50)
        while len(made.beside) < 150 * running:
            made.step()
        done[policy] = made.now - begun
    assert first["bursts"] < sooner * first["fcfs"], first
    assert done["bursts"] <= 1.01 * done["fcfs"], "the same tokens are there as soon"
    assert median["bursts"] <= 1.01 * median["fcfs"], median
    assert largest["fcfs"] < largest["bursts"] <= 1e-3 * LONGEST_MS + 1e-9, largest


def test_who_waits_for_a_place_makes_no_step_longer() -> None:
    steps = {}
    for policy in ("fcfs", "bursts"):
        made = simulated(policy, max_running=8)
        for i in range(8):
            made.add(f"r{i}", 4, 30 + 20 * i)  # one after the other leaves
        for _ in range(3):
            made.step()
        made.burst(7, prompt=200, output=300)
        steps[policy] = made.steps
    assert steps["bursts"] == steps["fcfs"] and len(steps["fcfs"]) > 100


def test_they_are_heard_in_the_order_in_which_they_came() -> None:
    made = beside("bursts", 4)
    made.burst(24)
    heard = [round(made.first[f"b{i}"] + APART_S * i, 9) for i in range(24)]
    assert heard == sorted(heard) and len(set(heard)) > 2


def test_a_long_prompt_alone_is_computed_as_under_fcfs() -> None:
    steps = {}
    for policy in ("fcfs", "bursts"):
        made = beside(policy, 16)
        made.burst(1, prompt=800, output=2)
        steps[policy] = made.steps
    assert steps["bursts"] == steps["fcfs"] and len(steps["fcfs"]) > 10
    quiet = COSTS.step + 16 * COSTS.single
    assert max(ms for ms, _, _ in steps["bursts"]) <= max(SHORT_MS, QUIET_STEPS * quiet) + 1e-9


def test_long_prompts_that_come_together_have_no_step_longer_than_their_shares() -> None:
    """Until one of them is at its end, which its share and the others' may let through."""
    made = beside("bursts", 16)
    made.burst(3, prompt=700, output=2)
    quiet = COSTS.step + 16 * COSTS.single
    spare = max(SHORT_MS, QUIET_STEPS * quiet) - quiet
    assert max(ms for ms, _, _ in made.steps) <= quiet + 3 * spare + 3 * COSTS.single + 1e-9
    longer = [ms for ms, _, _ in made.steps if ms > quiet + spare + 3 * COSTS.single]
    assert len(longer) <= 3, "at most one for each prompt's end"


@pytest.mark.parametrize("single", [0.1, 1.5])
def test_no_step_is_longer_than_the_longest_there_may_be(single: float) -> None:
    made = beside("bursts", 8, step_tokens=4000, blocks=3000)
    made.engine.scheduler.step_time.estimate = replace(COSTS, single=single, token=0.5)
    made.burst(64, prompt=24, output=3)
    for ms, singles, tokens in made.steps:
        quiet = COSTS.step + single * singles
        assert ms <= max(LONGEST_MS, LONGEST_STEPS * quiet) + 0.5 * LEAST_CHUNK + 1e-6 or not singles, tokens
    assert max(ms for ms, singles, _ in made.steps if singles) > 2 * max(SHORT_MS, QUIET_STEPS * (1.5 + 8 * single))


def test_running_requests_lose_no_more_together_than_the_others_have_waited() -> None:
    made = beside("bursts", 8)
    for i in range(12):
        made.add(f"b{i}", 48, 4)
    made.step()  # nobody has waited yet
    ms, singles, _ = made.steps[-1]
    assert singles == 8 and ms <= max(SHORT_MS, QUIET_STEPS * COSTS.quiet_ms(made.engine.scheduler.plan().load))
    plan = made.engine.scheduler.plan()
    waited = 1e3 * sum(made.now - r.arrived for r in (*made.engine.scheduler.waiting.requests(),))
    quiet = COSTS.quiet_ms(plan.load)
    base = max(SHORT_MS, QUIET_STEPS * quiet) - quiet
    prompts = COSTS.token * plan.load.tokens
    assert base < prompts <= base + (waited + 1e3 * made.now) / plan.load.singles


def test_an_operator_s_own_target_is_kept() -> None:
    steps = {}
    for policy in ("fcfs", "bursts"):
        made = beside(policy, 4)
        made.engine.scheduler.budget = replace(made.engine.scheduler.budget, itl_target_ms=5.0)
        made.burst(24)
        steps[policy] = made.steps
    assert steps["bursts"] == steps["fcfs"]


def test_those_that_have_been_heard_before_make_no_step_longer() -> None:
    """Preempted requests compute their tokens again, as prompts do, but nobody waits for their first one."""
    steps = {}
    for policy in ("fcfs", "bursts"):
        made = simulated(policy, blocks=40, block_size=4)
        for i in range(8):
            made.add(f"r{i}", 4, 100)
        while made.engine.has_work:
            made.step()
        assert made.engine.scheduler.preemptions > 1
        steps[policy] = made.steps
    assert steps["bursts"] == steps["fcfs"]
