"""Requests that run out of time end, wherever they stand, with the reason."""

from __future__ import annotations

import pytest
from support.fake_runner import fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def at(engine: Engine, seconds: float) -> dict[str, tuple[str | None, str]]:
    """Why each request ends that is told of at this time."""
    engine.scheduler.clock = lambda: seconds
    return {d.request_id: (d.finish_reason, d.error) for d in engine.step() if d.finish_reason}


def test_a_request_that_has_not_begun_in_time_ends() -> None:
    engine = fake_engine(max_running=1)
    engine.add("a", [1], LONG, scheduling=SchedulingParams(queue_timeout_s=2))
    engine.add("b", [1], LONG, scheduling=SchedulingParams(queue_timeout_s=2))
    assert at(engine, 1.9) == {}
    error = "the request did not begin within its queue_timeout_s of 2 s"
    assert at(engine, 2.0) == {"b": ("timeout", error)}
    assert list(engine.scheduler.running) == ["a"]
    assert engine.scheduler.timeouts == 1


def test_time_that_passed_before_a_request_came_counts() -> None:
    engine = fake_engine(max_running=1)
    engine.add("a", [1], LONG, scheduling=SchedulingParams(timeout_s=3), age_s=2)
    engine.add("b", [1], LONG, scheduling=SchedulingParams(queue_timeout_s=2), age_s=1.5)
    assert at(engine, 0.4) == {}
    assert set(at(engine, 0.5)) == {"b"}
    assert at(engine, 1.0) == {"a": ("timeout", "the request did not end within its timeout_s of 3 s")}


def test_a_running_request_ends_when_its_time_is_over_and_releases_its_blocks() -> None:
    engine = fake_engine()
    engine.add("a", [1], LONG, scheduling=SchedulingParams(timeout_s=3, queue_timeout_s=1))
    assert at(engine, 0) == at(engine, 2.9) == {}
    assert at(engine, 3.0) == {"a": ("timeout", "the request did not end within its timeout_s of 3 s")}
    assert not engine.has_work
    assert engine.scheduler.pool.available == engine.scheduler.pool.total


def test_a_preempted_request_has_begun() -> None:
    engine = fake_engine(max_running=1, policy="priority")
    engine.add("a", [1], LONG, scheduling=SchedulingParams(queue_timeout_s=1, priority=1))
    at(engine, 0)
    engine.add("b", [1], LONG)
    assert at(engine, 0.5) == {}
    assert list(engine.scheduler.running) == ["b"]
    assert at(engine, 5) == {}
    assert engine.scheduler.get("a") is not None


def test_ended_requests_leave_no_deadlines_behind() -> None:
    engine = fake_engine()
    for i in range(500):
        engine.add(str(i), [1], LONG, scheduling=SchedulingParams(timeout_s=1000, queue_timeout_s=1000))
        if i:
            engine.finish(str(i))
        assert len(engine.scheduler._deadlines) < 100
    engine.finish("0")
    assert len(engine.scheduler._deadlines) == 0


@pytest.mark.parametrize("field", ["weight", "queue_timeout_s", "timeout_s"])
def test_terms_that_make_no_sense_are_named(field: str) -> None:
    for value in (0, -1.0, float("nan")):
        with pytest.raises(ParameterError, match=field):
            SchedulingParams(**{field: value})
