"""Log probabilities in /v1/responses: those of the tokens of each message's text, whole and as events."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from support.fake_engine import FakeEngine, saying
from support.serving import app_around, ask
from support.tool_chats import CALLED, templated

from dsc_serve.text.tokenizer import Tokenizer

INCLUDE = ["message.output_text.logprobs"]
TEMPLATE = "{% if tools %}<tool_call></tool_call>{% endif %}{{ messages[0].content }}{# </think> #}"
TIME = {"type": "function", "name": "weather"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def app(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    engine.script = saying("Héllo.")
    return app_around(engine, tokenizer)


@pytest.fixture
def dialect(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    """Of a model that reasons and calls."""
    return app_around(engine, templated(tokenizer, TEMPLATE))


def respond(app: FastAPI, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/responses", json={"input": "hi", **fields})


def answer_of(app: FastAPI, **fields: Any) -> dict[str, Any]:
    response = respond(app, **fields)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    body: dict[str, Any] = response.json()
    return body


def events_of(app: FastAPI, **fields: Any) -> list[dict[str, Any]]:
    response = respond(app, stream=True, **fields)
    assert response.status_code == 200, response.text
    blocks = response.text.split("\n\n")[:-1]
    events: list[dict[str, Any]] = [httpx.Response(200, text=block.split("data: ")[1]).json() for block in blocks]
    for event in events:
        EVENT.validate_python(event)
    return events


def told_in(body: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The log probabilities of each message."""
    return [item["content"][0]["logprobs"] for item in body["output"] if item["type"] == "message"]


def text_of(entries: list[dict[str, Any]]) -> str:
    return bytes(byte for entry in entries for byte in entry["bytes"]).decode()


def test_each_token_of_the_text_has_one(app: FastAPI) -> None:
    body = answer_of(app, include=INCLUDE, top_logprobs=2)
    (entries,) = told_in(body)
    assert text_of(entries) == "Héllo." and body["top_logprobs"] == 2
    top = [{"token": "a", "logprob": -1.0, "bytes": [97]}, {"token": "b", "logprob": -2.0, "bytes": [98]}]
    assert entries[0] == {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": top}
    (plain,) = told_in(answer_of(app, include=INCLUDE))
    assert len(plain) == len(entries) and plain[0]["top_logprobs"] == []


@pytest.mark.parametrize(
    "fields", [{}, {"include": []}, {"include": None}, {"top_logprobs": 0}, {"include": ["web_search_call.results"]}]
)
def test_nobody_who_has_not_asked_gets_any(app: FastAPI, engine: FakeEngine, fields: dict[str, Any]) -> None:
    assert told_in(answer_of(app, **fields)) == [[]]
    assert engine.submitted[0][2].logprobs is None


@pytest.mark.parametrize("steps", [1, 3, 100])
@pytest.mark.parametrize(
    ("said", "texts"),
    [
        ("Héllo.", ["Héllo."]),
        ("", []),
        ("<think>\nHm.\n</think>\nYes.", ["Yes."]),
        (f"So.\n{CALLED}", ["So.\n"]),
        (CALLED, []),
        (f"<think>Hm.</think>Well: {CALLED}", ["Well: "]),
    ],
)
def test_the_events_tell_what_the_whole_answer_says(
    dialect: FastAPI, engine: FakeEngine, steps: int, said: str, texts: list[str]
) -> None:
    engine.script, engine.tokens_per_step = saying(said), steps
    fields: dict[str, Any] = {"include": INCLUDE, "top_logprobs": 1, "tools": [TIME]}
    whole, events = answer_of(dialect, **fields), events_of(dialect, **fields)
    assert told_in(events[-1]["response"]) == told_in(whole)
    assert [text_of(entries) for entries in told_in(whole) if entries] == texts
    streamed: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["type"] == "response.output_text.delta":
            streamed.setdefault(event["item_id"], []).extend(event["logprobs"])
        if event["type"] == "response.output_text.done":
            assert event["logprobs"] == streamed[event["item_id"]]
        if event["type"] == "response.content_part.added" and event["part"]["type"] == "output_text":
            assert event["part"]["logprobs"] == []
    assert list(streamed.values()) == told_in(whole)


def test_reasoning_and_calls_have_none(dialect: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying(f"<think>Hm.</think>Yes.\n{CALLED}")
    fields: dict[str, Any] = {"include": INCLUDE, "tools": [TIME]}
    body = answer_of(dialect, **fields)
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    (entries,) = told_in(body)
    assert text_of(entries) == "Yes.\n"
    body = answer_of(dialect, **{**fields, "tools": []})
    (entries,) = told_in(body)
    assert text_of(entries) == f"Yes.\n{CALLED}"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "only be when include"),
        ({"top_logprobs": 2, "include": ["web_search_call.results"]}, "top_logprobs", "only be when include"),
        ({"top_logprobs": -1, "include": INCLUDE}, "top_logprobs", "-1"),
        ({"top_logprobs": 10**6, "include": INCLUDE}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": "2", "include": INCLUDE}, "top_logprobs", "an integer"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "message.output_text.logprobs"),
        ({"include": [*INCLUDE, "everything"]}, "include.1", "message.output_text.logprobs"),
        ({"include": INCLUDE[0]}, "include", "a list"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_its_name(
    app: FastAPI, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    response = respond(app, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error
    assert engine.submitted == []
