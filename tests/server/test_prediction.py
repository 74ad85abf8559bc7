"""OpenAI's `prediction` field and `dsc.max_drafts`: what reaches the engine, what is told, what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import chat, complete, events_of

TOLD = {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2}


@pytest.mark.parametrize("content", ["abcd", [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]])
def test_a_prediction_arrives_as_tokens_and_usage_tells_of_it(app: FastAPI, engine: FakeEngine, content: Any) -> None:
    engine.prediction, engine.tokens_per_step = (3, 1), 4
    response = chat(app, max_tokens=8, prediction={"type": "content", "content": content})
    assert response.status_code == 200, response.text
    assert engine.submitted[0][2].prediction_token_ids == tuple(b"abcd")
    assert response.json()["usage"]["completion_tokens_details"] == TOLD


def test_a_stream_tells_it_at_its_end(app: FastAPI, engine: FakeEngine) -> None:
    engine.prediction, engine.tokens_per_step = (3, 1), 4
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(chat(app, max_tokens=8, prediction={"type": "content", "content": "abcd"}, **fields))
    assert events[-1]["usage"]["completion_tokens_details"] == TOLD


def test_all_choices_count(app: FastAPI, engine: FakeEngine) -> None:
    engine.prediction, engine.tokens_per_step = (3, 1), 8
    usage = chat(app, max_tokens=8, n=2, prediction={"type": "content", "content": "x"}).json()["usage"]
    assert usage["completion_tokens_details"] == TOLD


def test_usage_says_nothing_of_it_where_there_is_none(app: FastAPI) -> None:
    assert "completion_tokens_details" not in chat(app, max_tokens=2).json()["usage"]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("abc", "prediction"),
        ({}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "text", "content": "x"}, "prediction.type"),
        ({"type": "content", "content": 1}, "prediction.content"),
        ({"type": "content", "content": "x", "more": 1}, "prediction.more"),
        ({"type": "content", "content": [{"type": "image"}]}, "prediction.content.0.type"),
    ],
)
def test_what_is_no_prediction_is_named(app: FastAPI, engine: FakeEngine, value: Any, param: str) -> None:
    response = chat(app, prediction=value)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.submitted == []


def test_without_speculation_a_prediction_is_refused(app: FastAPI, engine: FakeEngine) -> None:
    engine.capacity = msgspec.structs.replace(engine.capacity, max_drafts=0)
    error = chat(app, prediction={"type": "content", "content": "x"}).json()["error"]
    assert error["param"] == "prediction"
    assert error["message"] == "prediction is set; it would do nothing, since speculation is off here"
    assert chat(app, dsc={"max_drafts": 0}).status_code == 200


@pytest.mark.parametrize("ask_for", [complete, chat])
def test_a_request_may_ask_for_fewer_drafts(app: FastAPI, engine: FakeEngine, ask_for: Any) -> None:
    for most in (0, 7):
        assert ask_for(app, dsc={"max_drafts": most}).status_code == 200
        assert engine.submitted[-1][2].max_drafts == most
    for value in (-1, 65, "3", 1.5, True):
        error = ask_for(app, dsc={"max_drafts": value}).json()["error"]
        assert error["param"] == "dsc.max_drafts"
    error = ask_for(app, dsc={"max_drafts": 8}).json()["error"]
    assert error["param"] == "dsc.max_drafts"
    assert error["message"] == "dsc.max_drafts is 8; it must be at most 7, as this engine was started"
