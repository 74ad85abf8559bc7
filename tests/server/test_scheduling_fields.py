"""Whom a request is for, how urgent it is, its limits of time, and what it found in the prefix cache."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import complete, events_of

from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.worker.messages import Delta

LATE = Delta("", [], "timeout", error="the request did not end within its timeout_s of 2 s")


def test_the_engine_learns_the_terms(app: FastAPI, engine: FakeEngine) -> None:
    engine.policy = "priority"
    complete(app, user="anna", priority=-3, queue_timeout_s=1.5, timeout_s=9, cache_salt="pepper")
    expected = SchedulingParams(tenant="anna", priority=-3, queue_timeout_s=1.5, timeout_s=9.0, cache_salt="pepper")
    assert engine.scheduling == [expected]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("priority", 1, "priority is 1; it must be 0 on this server, whose policy is fcfs, not priority"),
        ("queue_timeout_s", 0, "queue_timeout_s is 0.0; it must be above 0 and at most 604800 seconds"),
        ("timeout_s", -1, "timeout_s is -1.0; it must be above 0"),
        ("timeout_s", "soon", "must be a number"),
        ("cache_salt", "x" * 257, "cache_salt is '257 characters'; it must be at most 256"),
    ],
)
def test_terms_that_cannot_be_kept_are_refused(app: FastAPI, field: str, value: Any, message: str) -> None:
    response = complete(app, **{field: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert message in error["message"]


def test_time_that_runs_out_before_the_first_token_is_an_error(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after, engine.error = 0, LATE
    response = complete(app)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (408, "timeout", LATE.error)


def test_time_that_runs_out_later_ends_the_answer_with_what_there_is(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after, engine.error = 3, LATE
    (choice,) = complete(app).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["dsc"]) == ("abc", "length", {"finish_reason": "timeout"})
    last = events_of(complete(app, stream=True))[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["dsc"] == {"finish_reason": "timeout"}


def test_usage_counts_a_prompt_that_was_cached_once(app: FastAPI, engine: FakeEngine) -> None:
    engine.cached_tokens = 16
    for fields in ({"n": 3}, {"prompt": [1] * 20}, {"prompt": [[1] * 20]}):
        usage = complete(app, **fields).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    usage = complete(app, prompt=[[1] * 20, [2] * 20], n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
