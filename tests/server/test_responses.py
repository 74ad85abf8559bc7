"""POST /v1/responses: what comes back for what was asked, whole and as typed events, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from support.fake_engine import FakeEngine, saying
from support.serving import app_around, ask

from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.tokenizer import Tokenizer

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TEMPLATE = (
    "{% if tools %}[{{ tools | length }}]<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "<assistant>{# </think> #}"
)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": CITY, "strict": True}
TIME = {"type": "function", "name": "time"}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NAMES = ("id", "call_id", "item_id", "created_at", "completed_at")
PART = {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}


@pytest.fixture
def app(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    own = Tokenizer(tokenizer._backend, eos_token_id=256, chat_template=ChatTemplate(TEMPLATE, {}))
    engine.script = saying("Hello.")
    return app_around(engine, own)


def respond(app: FastAPI, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/responses", json={"input": "hi", **fields})


def answer_of(app: FastAPI, **fields: Any) -> dict[str, Any]:
    """A whole answer, which OpenAI's own types take."""
    response = respond(app, **fields)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    body: dict[str, Any] = response.json()
    return body


def events_of(app: FastAPI, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, numbered, framed and of types that OpenAI's client knows."""
    response = respond(app, stream=True, **fields)
    assert response.status_code == 200, response.text
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    events = []
    for i, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == i
        EVENT.validate_python(event)
        events.append(event)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    return events


def prompt_of(engine: FakeEngine, i: int = 0) -> str:
    return bytes(engine.submitted[i][1]).decode()


def without_names(value: Any) -> Any:
    """Without ids and times, which no two answers share."""
    if isinstance(value, dict):
        return {
            k: without_names(v)
            for k, v in value.items()
            if k not in ("id", "call_id", "item_id", "created_at", "completed_at")
        }
    return [without_names(inner) for inner in value] if isinstance(value, list) else value


def test_an_answer_has_the_shape_of_openais(app: FastAPI) -> None:
    body = answer_of(
        app, metadata={"a": "b"}, temperature=0.5, max_output_tokens=20, instructions="Be brief.", user="me"
    )
    assert body["id"].startswith("resp_") and body["output"][0]["id"].startswith("msg_")
    tokens = len("<system>Be brief.<user>hi<assistant>")
    assert without_names(body) == {
        "object": "response", "status": "completed", "background": False, "error": None, "incomplete_details": None,
        "instructions": "Be brief.", "max_output_tokens": 20, "metadata": {"a": "b"}, "model": "fake",
        "output": [{"type": "message", "role": "assistant", "content": [PART], "status": "completed"}],
        "parallel_tool_calls": True, "previous_response_id": None, "reasoning": {"effort": None, "summary": None},
        "service_tier": "default", "store": False, "temperature": 0.5, "text": {"format": {"type": "text"}},
        "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "user": "me",
        "usage": {
            "input_tokens": tokens, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": tokens + 6,
        },
    }  # fmt: skip


ANSWERS = [
    "Hello.",
    "",
    "So.\n" + CALLED,
    CALLED + "\n" + CALLED,
    "<think>\nHm.\n</think>\nYes.",
    f"<think>Hm.</think>{CALLED}",
]


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("limit", [None, 30])
def test_the_events_tell_what_the_whole_answer_says(
    app: FastAPI, engine: FakeEngine, text: str, limit: int | None
) -> None:
    engine.script = saying(text)
    fields: dict[str, Any] = {"tools": [WEATHER, TIME], **({} if limit is None else {"max_output_tokens": limit})}
    whole, events = answer_of(app, **fields), events_of(app, **fields)
    cut = limit is not None and len(text) >= limit
    assert events[-1]["type"] == ("response.incomplete" if cut else "response.completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert without_names(events[-1]["response"]) == without_names(whole)
    built: list[dict[str, Any]] = []
    for event in events[2:-1]:
        assert event.get("item_id", built[-1]["id"] if built else None) in (None, *(item["id"] for item in built))
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(built) and event["item"]["status"] == "in_progress"
                built.append(event["item"])
            case "content_part.added":
                built[-1]["content"].append(event["part"])
            case "output_text.delta" | "reasoning_text.delta":
                built[-1]["content"][0]["text"] += event["delta"]
            case "function_call_arguments.delta":
                built[-1]["arguments"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == built[-1]["content"][0]["text"]
            case "content_part.done":
                assert event["part"] == built[-1]["content"][0]
            case "function_call_arguments.done":
                assert (event["arguments"], event["name"]) == (built[-1]["arguments"], built[-1]["name"])
            case "output_item.done":
                assert event["item"] == {**built[-1], "status": event["item"]["status"]}
                built[-1] = event["item"]
    assert built == events[-1]["response"]["output"]


def test_items_are_of_the_kinds_that_the_answer_has(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying(f"<think>Hm.</think>So.\n{CALLED}")
    body = answer_of(app, tools=[WEATHER])
    reasoning, message, call = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "So.\n"
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Rome"}')
    assert call["call_id"].startswith("call_") and call["id"].startswith("fc_")
    assert body["tools"] == [WEATHER]
    assert 0 < body["usage"]["output_tokens_details"]["reasoning_tokens"] <= len("<think>Hm.</think>")


def test_items_of_the_input_reach_the_template(app: FastAPI, engine: FakeEngine) -> None:
    first = answer_of(app)["output"]
    items = [
        {"role": "developer", "content": "D"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}],
        },
        *first,
        {"role": "user", "content": "B"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
            "status": "completed",
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{**PART, "text": "So."}],
            "id": "msg_1",
            "status": "completed",
        },
        {
            "type": "function_call",
            "call_id": "a",
            "name": "weather",
            "arguments": '{"city": "Rome"}',
            "id": "fc_1",
            "status": "completed",
        },
        {"type": "function_call", "call_id": "b", "name": "time", "arguments": "", "id": None},
        {"type": "function_call_output", "call_id": "b", "output": "noon"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "sunny"}]},
    ]
    answer_of(app, input=items, instructions="I", tools=[WEATHER, TIME])
    assert prompt_of(engine, 1) == (
        "[2]<tool_call></tool_call><system>I<system>D<user>one\ntwo<assistant>Hello.<user>B"
        '<assistant>(Hm.)So.weather{"city": "Rome"}time{}<tool>noon<tool>sunny<assistant>'
    )


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def test_the_form_of_the_text_can_be_asked_for(app: FastAPI, engine: FakeEngine) -> None:
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    assert answer_of(app, text={"format": form})["text"] == {"format": form}
    asked = engine.submitted[0][2].structured_outputs
    assert asked is not None and asked.json is not None and json.loads(asked.json) == SCHEMA
    answer_of(app, text={"format": {"type": "json_object"}})
    asked = engine.submitted[1][2].structured_outputs
    assert asked is not None and asked.json_object
    answer_of(app, text={"format": {"type": "text"}, "verbosity": "medium"})
    assert engine.submitted[2][2].structured_outputs is None


def test_fields_reach_the_engine(app: FastAPI, engine: FakeEngine) -> None:
    answer_of(app, temperature=0.5, top_p=0.9, top_k=3, seed=4, max_output_tokens=7)
    params = engine.submitted[0][2]
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.9, 3, 4, 7)
    answer_of(app, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
    asked = engine.submitted[1][2].structured_outputs
    assert asked is not None and asked.calls is not None and asked.calls.most == 1
    answer_of(app, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
    asked = engine.submitted[2][2].structured_outputs
    assert asked is not None and asked.calls is not None and len(asked.calls.tools) == 2 and asked.calls.most == 1
    answer_of(app, tools=[WEATHER], tool_choice="none")
    assert "[1]" not in prompt_of(engine, 3)


@pytest.mark.parametrize("store", [None, True, False])
def test_nothing_is_stored_whatever_is_asked(app: FastAPI, store: bool | None) -> None:
    assert answer_of(app, store=store)["store"] is False


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_where_that_is_asked(
    app: FastAPI, engine: FakeEngine
) -> None:
    turns = [{"role": role, "content": f"{i}{role[0]}" + "x" * 60} for i in range(5) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "last"}]
    refused = respond(app, input=items)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert answer_of(app, input=items, truncation="auto", max_output_tokens=50)["truncation"] == "auto"
    prompt = prompt_of(engine)
    assert prompt.startswith("<system>S<user>2u") and prompt.endswith("<user>last<assistant>")
    assert len(prompt) + 50 <= engine.capacity.max_tokens
    alone = [{"role": "user", "content": "x" * 600}]
    assert respond(app, input=alone, truncation="auto").json()["error"]["code"] == "context_length_exceeded"
    answer_of(app, truncation="auto")
    assert prompt_of(engine, 1) == "<user>hi<assistant>"


def test_a_failure_is_an_event_once_the_answer_has_begun(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 3
    events = events_of(app)
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["content"][0]["text"] == "Hel" and failed["output"][0]["status"] == "incomplete"
    assert respond(app).status_code == 500
    engine.fail_after = 0
    assert respond(app, stream=True).status_code == 500


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "a string or a list"),
        ({"input": []}, "input", "a list of at least 1"),
        ({"input": [5]}, "input.0", "function_call_output"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "function_call_output"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "assistant"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "input_text",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0.type", "input_text"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input.0.call_id", '"a"'),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "x"}]}, "input.0.arguments", "missing"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0.encrypted_content", "not supported"),
        ({"input": "x" * 600}, "input", "tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no answers"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "not supported"),
        ({"truncation": "last"}, "truncation", "auto"),
        ({"metadata": {"a": 1}}, "metadata.a", "a string"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "together"),
        ({"temperature": -1}, "temperature", "greedy"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools.0.name", "missing"),
        ({"tools": [{**TIME, "parameters": {"type": "array"}}]}, "tools.0.parameters.type", "object"),
        (
            {"tools": [TIME, {**WEATHER, "parameters": {"properties": {"a": {"type": "strin"}}}}]},
            "tools.1.parameters",
            "strin",
        ),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice", '"name"'),
        ({"tools": [TIME], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", '"time"'),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text.format.name", "missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
        ({"text": {"format": {"type": "text", "schema": SCHEMA}}}, "text.format.schema", "may only be"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}},
            "text.format",
            "strin",
        ),
        ({"stream_options": {}}, "stream_options", "stream is true"),
        ({"messages": []}, "messages", "not a field"),
        ({"max_tokens": 5}, "max_tokens", "not a field"),
        ({"model": "gpt"}, "model", "not served"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_its_name(
    app: FastAPI, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    response = respond(app, **fields)
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error
    assert engine.submitted == []


def test_it_is_counted_and_limited_as_other_generations(app: FastAPI) -> None:
    answer_of(app)
    text = ask(app, "GET", "/metrics").text
    assert 'dsc_serve_requests_total{endpoint="/v1/responses",status="200"} 1.0' in text
    assert 'dsc_serve_generations_total{finish_reason="stop"} 1.0' in text
