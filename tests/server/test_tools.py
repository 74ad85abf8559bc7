"""Tools in chats: how they reach the model, how calls come back, streamed and whole, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine, saying
from support.serving import MESSAGES, app_around, ask, chat, events_of
from support.tool_chats import (
    CALLED,
    CITY,
    HERMES,
    STRICT,
    TIME,
    TOOLS,
    TWO,
    calls_of,
    message_of,
    prompt_of,
    templated,
)

from dsc_serve.server.tools.dialect import MOST_CALLS
from dsc_serve.text.tokenizer import Tokenizer


@pytest.fixture
def hermes(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    return app_around(engine, templated(tokenizer, HERMES))


def test_the_template_gets_the_tools(hermes: FastAPI, engine: FakeEngine) -> None:
    chat(hermes, tools=TOOLS, max_tokens=1)
    assert prompt_of(engine) == "[weather time ]<tool_call></tool_call><user>hi<assistant>"
    chat(hermes, tools=TOOLS, tool_choice="none", max_tokens=1)
    assert prompt_of(engine, 1) == "<user>hi<assistant>"


def test_calls_come_back_as_openai_has_them(hermes: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("Let me see.\n" + TWO)
    response = chat(hermes, tools=TOOLS)
    message = message_of(response)
    assert message["content"] == "Let me see.\n"
    assert calls_of(message) == [("weather", '{"city": "Rome"}'), ("time", "{}")]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    engine.script = saying(TWO)
    assert message_of(chat(hermes, tools=TOOLS))["content"] is None


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_streamed_calls_have_openais_framing_and_add_up_to_the_whole(
    hermes: FastAPI, engine: FakeEngine, steps: int
) -> None:
    engine.script, engine.tokens_per_step = saying("Let me see.\n" + TWO), steps
    choices = [event["choices"][0] for event in events_of(chat(hermes, tools=TOOLS, stream=True))]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "tool_calls"
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Let me see.\n"
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    made: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            assert delta["index"] == len(made) and delta["function"]["arguments"] == ""
            made.append({"name": delta["function"]["name"], "arguments": ""})
        else:
            assert delta.keys() == {"index", "function"} and delta["function"].keys() == {"arguments"}
            made[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert made == [{"name": "weather", "arguments": '{"city": "Rome"}'}, {"name": "time", "arguments": "{}"}]


def test_log_probabilities_are_those_of_all_tokens_whatever_their_part(hermes: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("So: " + CALLED)
    whole = chat(hermes, tools=TOOLS, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    events = events_of(chat(hermes, tools=TOOLS, logprobs=True, stream=True))
    streamed = [entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole and len(whole) == len("So: " + CALLED)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": None}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_what_looks_like_a_call_is_text(
    hermes: FastAPI, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    engine.script = saying(CALLED)
    response = chat(hermes, **fields)
    assert message_of(response) == {"role": "assistant", "content": CALLED, "refusal": None}
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_each_choice_has_calls_of_its_own(hermes: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying(TWO)
    choices = chat(hermes, tools=TOOLS, n=2).json()["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in choices] == [2, 2]
    assert len({call["id"] for choice in choices for call in choice["message"]["tool_calls"]}) == 4


def test_no_parallel_calls_is_one_call(hermes: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying(TWO + "and more")
    for stream in (False, True):
        response = chat(hermes, tools=TOOLS, parallel_tool_calls=False, stream=stream)
        if stream:
            found = [
                c for e in events_of(response) for c in e["choices"][0]["delta"].get("tool_calls", []) if "id" in c
            ]
            assert [call["function"]["name"] for call in found] == ["weather"]
        else:
            assert calls_of(message_of(response)) == [("weather", '{"city": "Rome"}')]
    assert [reason for _, reason in engine.finished] == ["stop", "stop"]


def test_a_call_that_is_cut_off_ends_for_its_length(hermes: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying(CALLED)
    response = chat(hermes, tools=TOOLS, max_tokens=len(CALLED) - 17)
    assert calls_of(message_of(response)) == [("weather", '{"city": "Rom')]
    assert response.json()["choices"][0]["finish_reason"] == "length"
    text = ask(hermes, "GET", "/metrics").text
    assert 'dsc_serve_tool_calls_total{form="hermes"} 1.0' in text
    assert 'dsc_serve_tool_calls_malformed_total{form="hermes"} 1.0' in text


ROUND = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "provider_specific_fields": {"refusal": None},  # as LiteLLM sends an answer back
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sunny"}]},
]


def changed(arguments: str) -> list[dict[str, Any]]:
    messages = json.loads(json.dumps(ROUND))
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
    return messages


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city":"Rome"}', '{"city": "Rome"}'),
        ("", "{}"),
        ('{"city": ', json.dumps('{"city": ')),  # as the model wrote it, so that it can see its mistake
        ("[1]", '"[1]"'),
    ],
)
def test_earlier_calls_and_results_reach_the_template(
    hermes: FastAPI, engine: FakeEngine, arguments: str, shown: str
) -> None:
    chat(hermes, messages=changed(arguments), tools=TOOLS, max_tokens=1)
    assert prompt_of(engine).endswith(f"<user>hi<assistant>weather{shown}<tool>sunny<assistant>")


@pytest.mark.parametrize(
    "writes",
    [
        "{{ call.function.arguments | tojson }}",
        "{{ '' + call.function.arguments }}",
        "{{ call.function.arguments + '' }}",
        "{{ call.function.arguments }}",
        "{{ '' ~ call.function.arguments }}",
        "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}",
    ],
)
def test_arguments_are_an_object_or_json_as_the_template_takes_them(
    engine: FakeEngine, tokenizer: Tokenizer, writes: str
) -> None:
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}" + writes + "{% endfor %}{% endfor %}{{ tools }}"
    )
    app = app_around(engine, templated(tokenizer, template))
    chat(app, messages=changed('{"city":"Rom\u00e9"}'), max_tokens=1)
    assert prompt_of(engine) == '{"city": "Rom\u00e9"}None'


def test_a_template_without_tools_is_told_of_them_in_words(app: FastAPI, engine: FakeEngine) -> None:
    chat(app, tools=TOOLS, max_tokens=1)
    prompt = prompt_of(engine)
    assert prompt.startswith("<system>You may call tools.") and prompt.endswith("<user>hi<assistant>")
    assert '{"name": "NAME", "arguments": {…}}' in prompt
    assert '{"name": "weather", "description": "Of a city.", "parameters": {"type": "object"' in prompt
    chat(app, messages=[{"role": "system", "content": "Be brief."}, *ROUND], tools=TOOLS, max_tokens=1)
    prompt = prompt_of(engine, 1)
    assert prompt.startswith("<system>Be brief.\n\nYou may call tools.")
    assert prompt.endswith(
        '<assistant>{"name": "weather", "arguments": {"city": "Rome"}}<user>Result of weather:\nsunny<assistant>'
    )
    engine.script = saying('Well.\n{"name": "weather", "arguments": {"city": "Rome"}}')
    assert calls_of(message_of(chat(app, tools=TOOLS))) == [("weather", '{"city": "Rome"}')]


def test_the_form_can_be_chosen_and_is_shown(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    from dsc_serve.config import ServerConfig
    from dsc_serve.server.app import create_app

    app = create_app(ServerConfig(served_model_name="fake", tool_calls="hermes"), engine, tokenizer)
    assert ask(app, "GET", "/v1/models/fake").json()["tool_calls"] == "hermes"
    chat(app, tools=TOOLS, max_tokens=1)
    assert '<tool_call>\n{"name": "NAME", "arguments": {…}}\n</tool_call>' in prompt_of(engine)
    engine.script = saying(CALLED)
    assert calls_of(message_of(chat(app, tools=TOOLS))) == [("weather", '{"city": "Rome"}')]


def test_mistrals_ids_have_nine_letters_and_its_templates_get_no_others(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    template = (
        "{{ tools }}[TOOL_CALLS] [{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }}{% endfor %}"
        "{{ m.tool_call_id }} {% endfor %}"
    )
    app = app_around(engine, templated(tokenizer, template))
    engine.script = saying('[TOOL_CALLS] [{"name": "time", "arguments": {}}]')
    (call,) = message_of(chat(app, messages=ROUND, tools=TOOLS))["tool_calls"]
    assert re.fullmatch(r"[A-Za-z0-9]{9}", call["id"])
    first, second = prompt_of(engine).split("[TOOL_CALLS] [ ")[1].split()
    assert first == second and re.fullmatch(r"[A-Za-z0-9]{9}", first)


@pytest.mark.parametrize(
    ("fields", "most", "free", "heads"),
    [
        ({"tool_choice": "required"}, MOST_CALLS, False, ["weather", "time"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 1, False, ["weather", "time"]),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, 1, False, ["time"]),
        ({"tools": [STRICT, TIME]}, MOST_CALLS, True, ["weather", "time"]),
        ({"response_format": {"type": "json_object"}}, MOST_CALLS, False, ["weather", "time"]),
    ],
)
def test_what_must_be_a_call_is_constrained(
    hermes: FastAPI, engine: FakeEngine, fields: dict[str, Any], most: int, free: bool, heads: list[str]
) -> None:
    engine.script = saying(CALLED)
    assert chat(hermes, **{"tools": TOOLS, **fields}).status_code == 200
    asked = engine.submitted[0][2].structured_outputs
    assert asked is not None and asked.calls is not None
    assert asked.json_object is ("response_format" in fields)
    assert (asked.calls.most, bool(asked.calls.triggers)) == (most, free)
    assert [str(tool.head[0]).split('"')[3] for tool in asked.calls.tools] == heads


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
def test_what_may_be_text_is_not(hermes: FastAPI, engine: FakeEngine, fields: dict[str, Any]) -> None:
    chat(hermes, tools=TOOLS, **fields, max_tokens=1)
    assert engine.submitted[0][2].structured_outputs is None


def test_tools_that_are_not_strict_are_constrained_to_objects_alone(hermes: FastAPI, engine: FakeEngine) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"properties": {"a": {"type": "strin"}}}}}
    assert chat(hermes, tools=[STRICT, bad], max_tokens=1).status_code == 200
    asked = engine.submitted[0][2].structured_outputs
    assert asked is not None and asked.calls is not None
    assert [json.loads(tool.schema) for tool in asked.calls.tools] == [CITY, {"type": "object"}]


def tool(**function: Any) -> list[dict[str, Any]]:
    return [TIME, {"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
        ({"tools": tool(name="a b")}, "tools.1.function.name", "of the form"),
        ({"tools": tool(name="")}, "tools.1.function.name", "of the form"),
        ({"tools": tool(name="time")}, "tools.1.function.name", "earlier tool"),
        ({"tools": tool(parameters=[])}, "tools.1.function.parameters", "an object"),
        ({"tools": tool(parameters={"type": "string"})}, "tools.1.function.parameters.type", '"object"'),
        ({"tools": tool(strict="yes")}, "tools.1.function.strict", "true or false"),
        ({"tools": tool(cost=1)}, "tools.1.function.cost", "not a field"),
        ({"tools": TOOLS * 65}, "tools", "128"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "time"}}, "tool_choice", "required"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}},
            "tool_choice.function.name",
            '"weather", "time"',
        ),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        (
            {"tools": tool(strict=True, parameters={"properties": {"a": {"type": "strin"}}})},
            "tools.1.function.parameters",
            "strin",
        ),
        (
            {"tools": tool(parameters={"properties": {"a": {"uniqueItems": True}}}), "tool_choice": "required"},
            "tools.1.function.parameters",
            "uniqueItems",
        ),
        ({"tools": tool(strict=True, parameters={"title": "x" * 40_000})}, "tools", "32768"),
        ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 1}, "min_tokens", "decides when"),
        ({"messages": ROUND[2:]}, "messages.0.tool_call_id", "earlier message"),
        ({"messages": [*ROUND, {**ROUND[2], "tool_call_id": "b"}]}, "messages.3.tool_call_id", '"b"'),
        ({"messages": [*ROUND, {"role": "tool", "content": "x"}]}, "messages.3.tool_call_id", "missing"),
        ({"messages": [{**ROUND[1], "role": "user", "content": "x"}]}, "messages.0.tool_calls", "assistant"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages.0.tool_call_id", "tool"),
        ({"messages": [*ROUND[:2], {"role": "tool", "tool_call_id": "a"}]}, "messages.2.content", "missing"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages.0.tool_calls.0.function",
            "missing",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_its_name(
    hermes: FastAPI, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    response = chat(hermes, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error
    assert engine.submitted == []


def test_tokenizing_a_chat_takes_its_tools(hermes: FastAPI) -> None:
    def tokens(**fields: Any) -> list[int]:
        return ask(hermes, "POST", "/tokenize", json={"messages": MESSAGES, **fields}).json()["tokens"]

    assert bytes(tokens(tools=TOOLS)).decode().startswith("[weather time ]")
    assert tokens(tools=[]) == tokens()
    refused = ask(hermes, "POST", "/tokenize", json={"prompt": "x", "tools": TOOLS})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
