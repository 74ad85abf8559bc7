"""What each policy prefers, and within what bounds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from support.fake_runner import fake_engine
from test_scheduler import first_tokens

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.policies import POLICIES
from dsc_serve.engine.policies.plan_builder import LEAST_CHUNK
from dsc_serve.engine.step_time import Estimate
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def sign(engine: Engine, name: str, bits: int) -> None:
    request = engine.scheduler.get(name)
    assert request is not None
    request.signature = np.array([bits], dtype=np.uint64)


def test_affinity_prefers_the_atoms_that_are_in_use() -> None:
    engine = fake_engine(blocks=60, max_running=2, policy="affinity")
    engine.add("runs", [1, 2], LONG)
    sign(engine, "runs", 0b1111)
    engine.step()
    for name, bits in (("other", 0b11110000), ("half", 0b110011), ("same", 0b111)):
        engine.add(name, [3, 4], SHORT)
        sign(engine, name, bits)
    assert first_tokens(engine)[1:] == ["same", "half", "other"]


def test_the_shortest_prefill_counts_what_is_not_cached() -> None:
    engine = fake_engine(blocks=60, max_running=1, policy="shortest-prefill")
    engine.add("first", [1] * 16, SHORT)
    engine.step()
    engine.add("long", [2] * 12, SHORT)
    engine.add("short", [3] * 6, SHORT)
    engine.add("cached", [1] * 17, SHORT)
    assert first_tokens(engine)[1:] == ["cached", "short", "long"]


@pytest.mark.parametrize(("bounds", "latest"), [({"overtaken": 4}, 4), ({"overtake_s": 6.0}, 7)])
@pytest.mark.parametrize("policy", ["affinity", "shortest-prefill"])
def test_nobody_is_overtaken_beyond_the_bounds(policy: str, bounds: dict[str, float], latest: int) -> None:
    engine = fake_engine(blocks=60, max_running=2, policy=policy)
    scheduler = engine.scheduler
    scheduler.budget = replace(scheduler.budget, **{"overtaken": 99, "overtake_s": 1e9, **bounds})
    seconds = itertools.count()
    scheduler.clock = lambda: next(seconds)
    one = SamplingParams(temperature=0, max_tokens=1)
    engine.add("runs", [1], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    sign(engine, "runs", 0b1)
    engine.step()
    order: list[str] = []
    engine.add("patient", [5] * 12, one)
    sign(engine, "patient", 0b1000)
    for i in range(40):
        engine.add(str(i), [1], one)
        sign(engine, str(i), 0b1)
        order += [delta.request_id for delta in engine.step() if delta.request_id != "runs"]
    assert 0 < order.index("patient") <= latest


def test_the_urgent_preempt_the_less_urgent_and_wait_for_nobody() -> None:
    engine = fake_engine(blocks=60, max_running=2, policy="priority")
    engine.add("low", [1], LONG, scheduling=SchedulingParams(priority=5))
    engine.add("high", [2], LONG, scheduling=SchedulingParams(priority=-5))
    engine.step()
    engine.add("middle", [3], SHORT)
    engine.step()
    assert list(engine.scheduler.running) == ["high", "middle"]
    assert engine.scheduler.preemptions == 1
    engine.add("equal", [4], SHORT)
    engine.step()
    assert list(engine.scheduler.running) == ["high", "middle"]
    assert first_tokens(engine)[-1] == "low"


def test_an_urgent_prompt_waits_for_no_less_urgent_one_that_runs() -> None:
    engine = fake_engine(blocks=60, step_tokens=16, policy="priority")
    scheduler = engine.scheduler
    engine.add("long", [1] * 60, SHORT, scheduling=SchedulingParams(priority=1))
    engine.step()
    engine.add("equal", [2] * 4, SHORT, scheduling=SchedulingParams(priority=1))
    engine.add("urgent", [3] * 10, SHORT)
    assert scheduler.plan().tokens == {"urgent": 10, "long": 6}
    engine.step()
    assert scheduler.plan().tokens == {"urgent": 1, "long": 15}
    assert first_tokens(engine) == ["urgent", "long", "equal"]
    assert scheduler.preemptions == 0


def test_a_prompt_that_gives_way_is_not_preempted_for_by_those_admitted() -> None:
    """Ten blocks: 4 tokens of one prompt fit beside the other one and a block to spare for each."""
    engine = fake_engine(blocks=10, block_size=4, step_tokens=16, policy="priority")
    engine.add("long", [1] * 32, SHORT, scheduling=SchedulingParams(priority=1))
    engine.step()
    engine.add("urgent", [2] * 10, SHORT)
    assert engine.scheduler.plan().tokens == {"urgent": 10, "long": 4}
    assert first_tokens(engine) == ["urgent", "long"]


def test_victims_give_back_their_tokens() -> None:
    engine = fake_engine(blocks=60, step_tokens=2, max_running=2, policy="priority")
    for name in ("a", "b"):
        engine.add(name, [1], LONG, scheduling=SchedulingParams(priority=1))
    engine.step()
    engine.add("urgent", [2, 3], SHORT)
    plan = engine.scheduler.plan()
    assert (plan.tokens, plan.preempt) == ({"a": 1, "urgent": 1}, ["b"])


def test_nobody_is_preempted_where_that_would_not_help() -> None:
    engine = fake_engine(blocks=6, block_size=4, max_running=8, policy="priority")
    engine.add("urgent", [1] * 8, SHORT, scheduling=SchedulingParams(priority=-1))
    engine.add("low", [2] * 4, SHORT, scheduling=SchedulingParams(priority=1))
    engine.step()
    engine.add("large", [3] * 20, SHORT)
    engine.step()
    assert list(engine.scheduler.running) == ["urgent", "low"]


def test_a_tenant_with_few_requests_does_not_wait_behind_one_with_many() -> None:
    engine = fake_engine(blocks=60, max_running=1, policy="fair")
    for i in range(10):
        engine.add(f"many-{i}", [1, 2], SHORT, scheduling=SchedulingParams(tenant="many"))
    engine.step()
    engine.add("few", [3], SHORT, scheduling=SchedulingParams(tenant="few"))
    assert first_tokens(engine)[:2] == ["many-0", "few"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_chunks_leave_running_requests_their_time(policy: str) -> None:
    estimate = Estimate(step=10.0, single=1.0, token=0.5)
    engine = fake_engine(blocks=100, step_tokens=60, context=200, policy=policy, estimate=estimate)
    engine.scheduler.budget = replace(engine.scheduler.budget, itl_target_ms=30.0)
    for name in "ab":
        engine.add(name, [1], LONG)
    engine.step()
    engine.add("long", [2] * 150, SHORT)
    engine.step()
    assert engine.runner.step_sizes[-1] == 2 + 36  # type: ignore[attr-defined]  # (30 - 10 - 2) ms at 0.5 ms a token
    engine.scheduler.budget = replace(engine.scheduler.budget, itl_target_ms=11.0)
    engine.step()
    assert engine.runner.step_sizes[-1] == 2 + LEAST_CHUNK  # type: ignore[attr-defined]  # prompts move on all the same
