"""Every field of a request acts, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import MESSAGES, ask, chat, complete

from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.harmless import HarmlessGenerationFields
from dsc_serve.server.schema import ChatRequest, CompletionRequest

Ask = Callable[..., httpx.Response]
ENDPOINTS = [complete, chat]

PASSED_ON: dict[str, tuple[Any, Any]] = {
    "temperature": (0.5, 0.5),
    "top_p": (0.9, 0.9),
    "top_k": (7, 7),
    "min_p": (0.1, 0.1),
    "presence_penalty": (-1, -1.0),
    "frequency_penalty": (2, 2.0),
    "repetition_penalty": (1.5, 1.5),
    "logit_bias": ({"5": -100, "0": 1.5}, {5: -100.0, 0: 1.5}),
    "seed": (2**64 - 1, 2**64 - 1),
    "max_tokens": (9, 9),
    "min_tokens": (3, 3),
    "stop": (["x", "y"], ("x", "y")),
    "stop_token_ids": ([4, 5, 4], (4, 5)),
    "ignore_eos": (True, True),
    "skip_special_tokens": (False, False),
}
ELSEWHERE = {"dsc", "response_format", "structured_outputs", "model", "n"}
ELSEWHERE |= {"stream", "stream_options", "user", "logprobs", "priority", "queue_timeout_s", "timeout_s", "cache_salt"}
COMPLETION_ONLY = {"prompt", "echo", "best_of", "suffix"}
COMPLETION_ONLY |= {"max_completion_tokens", "add_special_tokens"}
ELSEWHERE |= {"truncate_prompt_tokens"}
CHAT_ONLY = {"messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls"}
CHAT_ONLY |= {
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "add_special_tokens",
    "echo",
    "prediction",
}

NEUTRAL: dict[str, list[Any]] = {
    "audio": [],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "modalities": [["text"]],
    "moderation": [],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "web_search_options": [],
}
COMPLETION_NEUTRAL: dict[str, list[Any]] = {"best_of": [1], "suffix": [""], "add_special_tokens": [True]}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_every_field_is_tested_here() -> None:
    shared = PASSED_ON.keys() | ELSEWHERE | HarmlessGenerationFields.model_fields.keys()
    assert CompletionRequest.model_fields.keys() == shared | COMPLETION_ONLY
    assert ChatRequest.model_fields.keys() == shared | CHAT_ONLY | NEUTRAL.keys()
    assert set(SamplingParams.__struct_fields__) <= shared | {
        "prompt_logprobs",
        "routing",
        "prediction_token_ids",
        "max_drafts",
    }


@pytest.mark.parametrize("ask_for", ENDPOINTS)
@pytest.mark.parametrize("field", PASSED_ON)
def test_a_sampling_field_arrives_in_the_engine(app: FastAPI, engine: FakeEngine, ask_for: Ask, field: str) -> None:
    sent, expected = PASSED_ON[field]
    assert ask_for(app, **{field: sent}).status_code == 200
    params = engine.submitted[0][2]
    assert getattr(params, field) == expected
    default = SamplingParams(max_tokens=16 if ask_for is complete else None)
    others = set(SamplingParams.__struct_fields__) - {field}
    assert all(getattr(params, name) == getattr(default, name) for name in others)


def test_one_stop_string_need_not_be_a_list(app: FastAPI, engine: FakeEngine) -> None:
    assert complete(app, stop="zz").status_code == 200
    assert engine.submitted[0][2].stop == ("zz",)


def test_logprobs_arrive_as_each_endpoint_names_them(app: FastAPI, engine: FakeEngine) -> None:
    complete(app, logprobs=4)
    complete(app, logprobs=4, echo=True)
    chat(app, logprobs=True)
    chat(app, logprobs=True, top_logprobs=20)
    asked = [(params.logprobs, params.prompt_logprobs) for _, _, params in engine.submitted]
    assert asked == [(4, None), (4, 4), (0, None), (20, None)]


@pytest.mark.parametrize("ask_for", ENDPOINTS)
def test_a_user_may_be_named(app: FastAPI, ask_for: Ask) -> None:
    assert ask_for(app, user="someone").status_code == 200
    assert error_of(ask_for(app, user=5))["param"] == "user"


@pytest.mark.parametrize("ask_for", ENDPOINTS)
def test_another_model_is_not_found(app: FastAPI, ask_for: Ask) -> None:
    error = error_of(ask_for(app, model="gpt"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "fake" in error["message"]


@pytest.mark.parametrize("field", NEUTRAL)
def test_an_unsupported_field_is_accepted_only_where_it_does_nothing(app: FastAPI, field: str) -> None:
    for value in [None, *NEUTRAL[field]]:
        assert chat(app, **{field: value}).status_code == 200
    for value in ("x", 1, True, {"type": "json_object"}, ["x"], 0, 1.0, ""):
        error = error_of(chat(app, **{field: value}))
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")
        assert "not supported" in error["message"]


@pytest.mark.parametrize("field", COMPLETION_NEUTRAL)
def test_so_is_one_of_completions(app: FastAPI, field: str) -> None:
    for value in [None, *COMPLETION_NEUTRAL[field]]:
        assert complete(app, **{field: value}).status_code == 200
    for value in ("x", 2, False):
        assert error_of(complete(app, **{field: value}))["param"] == field


@pytest.mark.parametrize("ask_for", ENDPOINTS)
@pytest.mark.parametrize("field", ["max_token", "guided_json", "Temperature", "", "(text)", "x" * 5000, "__class__"])
def test_an_unknown_field_is_named(app: FastAPI, ask_for: Ask, field: str) -> None:
    error = error_of(ask_for(app, **{field: None}))
    assert (error["param"], error["code"]) == (field[:120], "unknown_parameter")


def test_a_slip_of_the_pen_is_pointed_out(app: FastAPI) -> None:
    assert "max_tokens" in error_of(complete(app, max_token=5))["message"]


@pytest.mark.parametrize("ask_for", ENDPOINTS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.0}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 10**30}, "min_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop.1"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids.1"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1" * 40: 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "5"}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"user": "x" * 257}, "user"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"ignore_eos": "true"}, "ignore_eos"),
        ({"skip_special_tokens": 0}, "skip_special_tokens"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"model": 5}, "model"),
        ({"logprobs": "1"}, "logprobs"),
    ],
)
def test_a_wrong_value_is_named(app: FastAPI, engine: FakeEngine, ask_for: Ask, fields: Any, param: str) -> None:
    error = error_of(ask_for(app, **fields))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": ["hi", ""]}, "prompt.1"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": [[1], [2, True]]}, "prompt.1.1"),
        ({"prompt": [[1], "a"]}, "prompt.1"),
        ({"prompt": [1.0]}, "prompt.0"),
        ({"prompt": [None]}, "prompt.0"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, 10**30]}, "prompt"),
        ({"prompt": [[1], [300]]}, "prompt.1"),
        ({"prompt": [1] * 513}, "prompt"),
        ({"prompt": "x" * 513}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": ["x"] * 9}, "prompt"),
        ({"prompt": ["x"] * 3, "n": 3}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21, "echo": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": MESSAGES}, "messages"),
    ],
)
def test_a_wrong_field_of_completions_is_named(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    assert error_of(complete(app, **fields))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": MESSAGES * 4097}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [*MESSAGES, {"role": "user", "content": 5}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_wrong_field_of_chats_is_named_as_the_client_wrote_it(
    app: FastAPI, fields: dict[str, Any], param: str
) -> None:
    error = error_of(chat(app, **fields))
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]


def test_what_is_required_is_said_to_be_missing(app: FastAPI) -> None:
    for path, param in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        error = error_of(ask(app, "POST", path, json={}))
        assert (error["param"], error["code"]) == (param, "missing_required_parameter")


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(app: FastAPI) -> None:
    for response in (complete(app, prompt=[1] * 600), complete(app, max_tokens=600), complete(app, prompt="x" * 9999)):
        assert error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "logit_bias", "user", "max_tokens", "suffix"])
def test_numbers_that_are_none_are_refused(app: FastAPI, field: str, constant: str) -> None:
    value = f'{{"1": {constant}}}' if field == "logit_bias" else constant
    body = f'{{"prompt": "x", "{field}": {value}}}'
    response = ask(app, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert error_of(response)["param"].startswith(field)


def test_messages_about_long_values_stay_short(app: FastAPI) -> None:
    for response in (complete(app, temperature="x" * 10**6), complete(app, stop=["x" * 10**5] * 17)):
        assert len(error_of(response)["message"]) <= 500


def test_the_docs_show_every_field(app: FastAPI) -> None:
    document = ask(app, "GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["CompletionRequest"]["properties"].keys() == CompletionRequest.model_fields.keys()
    assert schemas["ChatRequest"]["properties"].keys() == ChatRequest.model_fields.keys()
    references = [part.split('"')[0] for part in json.dumps(document).split('"$ref": "#/components/schemas/')[1:]]
    assert references
    assert set(references) <= schemas.keys()
