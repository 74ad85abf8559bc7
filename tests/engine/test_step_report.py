"""What the engine reports of its steps, of the phases of requests and of the queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_runner import fake_engine

from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.histogram import Histogram
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.sampling_params import SamplingParams

FOUR = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def test_an_observation_belongs_to_the_edge_that_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.cumulative == [2, 4, 5]
    assert histogram.sum == 14.0
    assert Histogram((1.0, 2.0)).counts == [0, 0, 0]


def test_steps_are_counted_by_their_tokens_and_requests() -> None:
    engine = fake_engine(step_tokens=8)
    engine.add("a", [1] * 10, FOUR)
    engine.add("b", [2] * 3, FOUR)
    sizes = []
    while engine.has_work:
        engine.step()
        sizes.append(engine.runner.step_sizes[-1])
    report = engine.report
    assert sizes[0] == 8 and max(sizes[2:]) == 2
    assert report.tokens.cumulative[-1] == report.requests.cumulative[-1] == engine.counters.steps == len(sizes)
    assert report.tokens.sum == sum(sizes) == 10 + 3 + 2 * 3
    assert report.tokens.counts[report.tokens.edges.index(8.0)] >= 1


def test_the_parts_of_a_step_make_up_the_step(small_model: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(small_model()), dtype="fp32", kv_tokens=96, max_running=4, step_tokens=32)
    engine = Engine.for_model(prepare_model(config), config, strict=True)
    began = time.perf_counter()
    for name in ("a", "b", "c"):
        engine.add(name, [1, 2, 3, 4], FOUR)
    while engine.has_work:
        engine.step()
    passed = time.perf_counter() - began
    report = engine.report
    parts = (report.schedule_s, report.forward_s, report.sample_s, report.output_s)
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(report.seconds.sum)
    assert report.forward_s < report.seconds.sum < passed


def test_phases_of_a_request_follow_each_other() -> None:
    engine = fake_engine(step_tokens=4, max_running=4)
    now = 100.0

    def clock() -> float:
        return now

    engine.scheduler.clock = clock
    engine.add("a", [1] * 8, FOUR)
    now = 103.0
    engine.step()  # half of the prompt
    now = 110.0
    while engine.has_work:
        engine.step()
        now += 1
    phases = engine.scheduler.phases
    sums = [histogram.sum for histogram in (phases.queue, phases.prefill, phases.decode)]
    assert sums == [3.0, 7.0, 3.0]
    assert all(h.cumulative[-1] == 1 for h in (phases.queue, phases.prefill, phases.decode))


def test_a_request_that_never_began_has_no_decode_time() -> None:
    engine = fake_engine()
    engine.add("a", [1, 2], FOUR)
    assert engine.finish("a")
    phases = engine.scheduler.phases
    assert [h.cumulative[-1] for h in (phases.queue, phases.prefill, phases.decode)] == [0, 0, 0]


def test_waiting_requests_are_told_apart_by_what_they_wait_for() -> None:
    def held(**limits: int) -> dict[str, int]:
        engine = fake_engine(**limits)
        for i in range(5):
            engine.add(str(i), [i + 1] * 8, FOUR)
        engine.step()
        counts = engine.scheduler.held_back()
        assert sum(counts.values()) == len(engine.scheduler.waiting)
        return {reason: count for reason, count in counts.items() if count}

    assert held(max_running=2, step_tokens=64, blocks=40) == {"running": 3}
    assert held(max_running=8, step_tokens=64, blocks=6) == {"blocks": 3}
    assert held(max_running=8, step_tokens=16, blocks=40) == {"step": 3}


def test_a_preempted_request_waits_as_one() -> None:
    engine = fake_engine(blocks=6, step_tokens=64)
    engine.add("a", [1] * 8, SamplingParams(max_tokens=12, ignore_eos=True))
    engine.add("b", [2] * 8, SamplingParams(max_tokens=12, ignore_eos=True))
    while not engine.scheduler.preemptions:
        engine.step()
    assert engine.scheduler.held_back()["preempted"] == 1
