"""tool_choice with a list of allowed tools: all are shown to the model, and only those may be called."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai.types.responses import Response
from support.fake_engine import FakeEngine, saying
from support.serving import app_around, ask, chat
from support.tool_chats import CALLED, CITY, HERMES, TOOLS, calls_of, message_of, prompt_of, templated

from dsc_serve.server.tools.dialect import MOST_CALLS
from dsc_serve.text.tokenizer import Tokenizer

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
WEATHER, TIME = "weather", "time"


@pytest.fixture
def app(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    engine.script = saying(CALLED)
    return app_around(engine, templated(tokenizer, HERMES))


def in_chat(app: FastAPI, mode: object, names: list[str], **fields: Any) -> httpx.Response:
    listed = [{"type": "function", "function": {"name": name}} for name in names]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}
    return chat(app, **{"tools": TOOLS, "tool_choice": choice, **fields})


def in_response(app: FastAPI, mode: object, names: list[str], **fields: Any) -> httpx.Response:
    choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}
    return ask(app, "POST", "/v1/responses", json={"input": "hi", "tools": FLAT, "tool_choice": choice, **fields})


BOTH = pytest.mark.parametrize("send", [in_chat, in_response])


@BOTH
@pytest.mark.parametrize(
    ("mode", "names", "heads", "free"),
    [
        ("required", [WEATHER], [WEATHER], False),
        ("required", [TIME, WEATHER, TIME], [WEATHER, TIME], False),
        ("auto", [WEATHER], [WEATHER], True),
    ],
)
def test_only_the_allowed_ones_may_be_called(
    app: FastAPI, engine: FakeEngine, send: Any, mode: str, names: list[str], heads: list[str], free: bool
) -> None:
    assert send(app, mode, names).status_code == 200
    assert prompt_of(engine).startswith("[weather time ]"), "the model is shown them all"
    asked = engine.submitted[0][2].structured_outputs
    assert asked is not None and asked.calls is not None
    assert [str(tool.head[0]).split('"')[3] for tool in asked.calls.tools] == heads
    assert (asked.calls.most, bool(asked.calls.triggers)) == (MOST_CALLS, free)
    followed = json.loads(asked.calls.tools[0].schema)
    assert (followed == CITY) is not free


@BOTH
def test_auto_among_all_of_them_is_free(app: FastAPI, engine: FakeEngine, send: Any) -> None:
    assert send(app, "auto", [WEATHER, TIME]).status_code == 200
    assert engine.submitted[0][2].structured_outputs is None


def test_a_call_of_another_one_is_text(app: FastAPI, engine: FakeEngine) -> None:
    message = message_of(in_chat(app, "auto", [TIME]))
    assert (message["content"], message.get("tool_calls")) == (CALLED, None)
    assert calls_of(message_of(in_chat(app, "auto", [WEATHER]))) == [("weather", '{"city": "Rome"}')]


@BOTH
def test_parallel_calls_are_a_field_of_their_own(app: FastAPI, engine: FakeEngine, send: Any) -> None:
    assert send(app, "required", [WEATHER], parallel_tool_calls=False).status_code == 200
    asked = engine.submitted[0][2].structured_outputs
    assert asked is not None and asked.calls is not None and asked.calls.most == 1


def test_a_response_repeats_the_choice(app: FastAPI) -> None:
    body = in_response(app, "required", [WEATHER]).json()
    Response.model_validate(body)
    one = {"type": "function", "name": "weather"}
    assert body["tool_choice"] == {"type": "allowed_tools", "mode": "required", "tools": [one]}


@BOTH
@pytest.mark.parametrize(
    ("mode", "names", "fields", "param", "words"),
    [
        ("required", ["clock"], {}, "tools.0", '"weather", "time"'),
        ("auto", [WEATHER, "clock"], {}, "tools.1", '"weather", "time"'),
        ("auto", [], {}, "tools", "1 to 128"),
        ("auto", [WEATHER] * 129, {}, "tools", "1 to 128"),
        ("auto", [5], {}, "tools.0", "function"),
        ("none", [WEATHER], {}, "", "allowed_tools"),
        (None, [WEATHER], {}, "", "allowed_tools"),
        ("required", [WEATHER], {"tools": []}, "", "no tools"),
        ("auto", [WEATHER], {"tools": None}, "", "no tools"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_its_name(
    app: FastAPI,
    engine: FakeEngine,
    send: Any,
    mode: object,
    names: list[Any],
    fields: dict[str, Any],
    param: str,
    words: str,
) -> None:
    response = send(app, mode, names, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    nested = "allowed_tools." if send is in_chat else ""
    assert error["param"] == (f"tool_choice.{nested}{param}" if param else "tool_choice"), error
    assert words in error["message"], error
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("path", "choice"),
    [
        (
            "/v1/chat/completions",
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]},
        ),
        ("/v1/chat/completions", {"type": "allowed_tools"}),
        ("/v1/chat/completions", {"type": "allowed_tools", "allowed_tools": []}),
        ("/v1/chat/completions", {"type": "custom", "custom": {"name": "time"}}),
        ("/v1/responses", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
        ("/v1/responses", {"type": "web_search"}),
        ("/v1/responses", {"type": "function", "name": 5}),
        ("/v1/responses", ["auto"]),
        ("/v1/responses", 5),
    ],
    ids=str,
)
def test_other_forms_are_told_which_there_are(app: FastAPI, path: str, choice: object) -> None:
    own = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    fields = own if path.endswith("completions") else {"input": "hi", "tools": FLAT}
    error = ask(app, "POST", path, json={**fields, "tool_choice": choice}).json()["error"]
    assert error["param"] == "tool_choice" and '"required"' in error["message"] and "allowed_tools" in error["message"]
