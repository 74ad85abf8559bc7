"""The fields that clients of OpenAI, vLLM, llama.cpp and TGI send: each acts, or changes nothing."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import tokenizers
from fastapi import FastAPI
from support.fake_engine import FakeEngine, saying
from support.serving import app_around, ask, chat, complete, events_of
from tokenizers import decoders, models, pre_tokenizers

from dsc_serve.config import ConfigError, ServerConfig
from dsc_serve.server.app import create_app
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HARMLESS: list[tuple[str, Any]] = [
    ("metadata", {"run": "5"}),
    ("prompt_cache_key", "conversation-5"),
    ("prompt_cache_retention", "24h"),
    ("safety_identifier", "somebody"),
    ("service_tier", "auto"),
    ("store", False),
    ("user", "somebody"),
    ("temperature", 1e-8),
    ("cache_prompt", True),
    ("use_beam_search", False),
    ("length_penalty", 1.0),
    ("length_penalty", 1),
    ("early_stopping", False),
    ("include_stop_str_in_output", False),
    ("spaces_between_special_tokens", True),
    ("detokenize", True),
    ("bad_words", []),
    ("return_token_ids", False),
    ("return_tokens_as_token_ids", False),
]
CHATS_HARMLESS: list[tuple[str, Any]] = [
    ("parallel_tool_calls", True),
    ("parallel_tool_calls", False),
    ("tool_choice", "auto"),
    ("tool_choice", "none"),
    ("tools", []),
    ("functions", []),
    ("function_call", "auto"),
    ("modalities", ["text"]),
    ("verbosity", "medium"),
    ("add_generation_prompt", True),
    ("continue_final_message", False),
    ("add_special_tokens", False),
    ("echo", False),
]
REFUSED: list[tuple[str, Any]] = [
    ("store", True),
    ("service_tier", "flex"),
    ("use_beam_search", True),
    ("length_penalty", 2.0),
    ("include_stop_str_in_output", True),
    ("spaces_between_special_tokens", False),
    ("bad_words", ["x"]),
    ("allowed_token_ids", [1]),
    ("return_token_ids", True),
]


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize(("field", "value"), HARMLESS, ids=str)
@pytest.mark.parametrize("ask_for", [complete, chat])
def test_a_harmless_value_changes_nothing(app: FastAPI, ask_for: Any, field: str, value: Any) -> None:
    assert text_of(ask_for(app, max_tokens=5, **{field: value})) == text_of(ask_for(app, max_tokens=5)) == "abcde"


@pytest.mark.parametrize(("field", "value"), CHATS_HARMLESS, ids=str)
def test_so_it_is_with_those_of_chats(app: FastAPI, field: str, value: Any) -> None:
    assert text_of(chat(app, max_tokens=5, **{field: value})) == "abcde"


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=str)
@pytest.mark.parametrize("ask_for", [complete, chat])
def test_what_would_change_an_answer_is_refused(app: FastAPI, ask_for: Any, field: str, value: Any) -> None:
    error = error_of(ask_for(app, **{field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_a_completions_limit_has_both_names(app: FastAPI, engine: FakeEngine) -> None:
    assert text_of(complete(app, max_completion_tokens=4)) == "abcd"
    assert text_of(complete(app, max_completion_tokens=4, max_tokens=4)) == "abcd"
    assert error_of(complete(app, max_completion_tokens=4, max_tokens=5))["param"] == "max_completion_tokens"
    assert error_of(complete(app, max_completion_tokens=0))["param"] == "max_completion_tokens"
    error = error_of(complete(app, max_completion_tokens=10**6))
    assert error["param"] == "max_completion_tokens"


def prompt_text(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.submitted[-1][1], skip_special_tokens=False)


def test_cache_control_is_accepted_where_anthropics_clients_put_it(app: FastAPI) -> None:
    control = {"type": "ephemeral"}
    part = {"type": "text", "text": "hi", "cache_control": control}
    assert chat(app, messages=[{"role": "user", "content": [part], "cache_control": control}]).status_code == 200


def test_a_name_is_the_templates_to_show(app: FastAPI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    assert chat(app, messages=[{"role": "user", "content": "hi", "name": "Ada"}]).status_code == 200
    assert prompt_text(engine, tokenizer) == "<user>hi<assistant>"  # whose template has no place for one


def test_an_assistant_may_have_said_nothing(app: FastAPI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    assert chat(app, messages=messages).status_code == 200
    assert prompt_text(engine, tokenizer) == "<user>a<assistant><user>b<assistant>"


def test_the_last_message_may_be_gone_on_with(app: FastAPI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well, "}]
    assert chat(app, messages=messages, continue_final_message=True).status_code == 200
    assert prompt_text(engine, tokenizer) == "<user>a<assistant>Well, "
    assert chat(app, messages=messages, add_generation_prompt=False).status_code == 200
    assert prompt_text(engine, tokenizer) == "<user>a<assistant>Well, "
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert error_of(chat(app, messages=messages, **both))["param"] == "continue_final_message"
    told = ask(app, "POST", "/tokenize", json={"messages": messages, "continue_final_message": True})
    assert told.json()["tokens"] == engine.submitted[0][1]
    wrong = ask(app, "POST", "/tokenize", json={"prompt": "x", "continue_final_message": True})
    assert error_of(wrong)["param"] == "continue_final_message"


@pytest.mark.parametrize("prompt", ["abcdefgh", list(b"abcdefgh")])
def test_a_prompt_is_cut_to_its_last_tokens(app: FastAPI, engine: FakeEngine, prompt: Any) -> None:
    assert complete(app, prompt=prompt, truncate_prompt_tokens=3).json()["usage"]["prompt_tokens"] == 3
    assert engine.submitted[-1][1] == list(b"fgh")
    assert complete(app, prompt=prompt, truncate_prompt_tokens=30).status_code == 200
    assert engine.submitted[-1][1] == list(b"abcdefgh")
    echoed = complete(app, prompt=prompt, truncate_prompt_tokens=3, echo=True, max_tokens=1)
    assert text_of(echoed) == "fgha"


def test_as_much_of_a_prompt_is_kept_as_fits(app: FastAPI, engine: FakeEngine) -> None:
    assert complete(app, prompt="x" * 700, truncate_prompt_tokens=-1, max_tokens=12).status_code == 200
    assert len(engine.submitted[-1][1]) == 500
    assert chat(app, messages=[{"role": "user", "content": "y" * 90_000}], truncate_prompt_tokens=-1).status_code == 200
    assert len(engine.submitted[-1][1]) == 511
    for wrong in (0, -2):
        assert error_of(complete(app, truncate_prompt_tokens=wrong))["param"] == "truncate_prompt_tokens"


def test_the_reason_of_a_stop_is_the_text_or_the_token_that_it_was(app: FastAPI) -> None:
    for ask_for in (complete, chat):
        choice = ask_for(app, stop=["zz", "de"]).json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "de")
        assert ask_for(app, max_tokens=3).json()["choices"][0]["stop_reason"] is None
        *_, last = events_of(ask_for(app, stop=["de"], stream=True))
        assert last["choices"][0]["stop_reason"] == "de"


def test_a_stop_token_is_a_reason_too(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("abc")
    assert complete(app, stop_token_ids=[99]).json()["choices"][0]["stop_reason"] == 99
    assert complete(app, stop_token_ids=[98]).json()["choices"][0]["stop_reason"] is None


FORMATS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    {"type": "json_schema", "schema": SCHEMA},
    {"type": "json_schema", "name": "x", "strict": True, "schema": SCHEMA},
    {"type": "json_object", "schema": SCHEMA},
    {"type": "json_object", "value": SCHEMA},
    {"type": "json", "value": SCHEMA},
    {"type": "json", "value": json.dumps(SCHEMA)},
    {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}},
]


@pytest.mark.parametrize("asked", FORMATS, ids=str)
def test_a_schema_is_found_where_clients_put_it(app: FastAPI, engine: FakeEngine, asked: dict[str, Any]) -> None:
    engine.script = saying('{"a":1}')
    assert chat(app, response_format=asked).status_code == 200
    wanted = engine.submitted[-1][2].structured_outputs
    assert wanted is not None and json.loads(wanted.json or "") == SCHEMA


def test_a_regex_is_one_of_text_generation_inferences_types(app: FastAPI, engine: FakeEngine) -> None:
    assert chat(app, response_format={"type": "regex", "value": "[a-z]+"}).status_code == 200
    assert engine.submitted[-1][2].structured_outputs == StructuredOutputs(regex="[a-z]+")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json"}, "response_format.value"),
        ({"type": "regex"}, "response_format.value"),
        ({"type": "regex", "value": {}}, "response_format.value"),
        ({"type": "regex", "schema": {}}, "response_format.schema"),
        ({"type": "text", "schema": {}}, "response_format.schema"),
        ({"type": "json", "value": 5}, "response_format.value"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "response_format.json_schema"),
        ({"type": "json_object", "schema": {}, "value": {}}, "response_format.value"),
        ({"type": "xml"}, "response_format.type"),
    ],
    ids=str,
)
def test_a_format_that_is_none_is_named(app: FastAPI, asked: dict[str, Any], param: str) -> None:
    assert error_of(chat(app, response_format=asked))["param"] == param


def test_a_model_may_have_several_names(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(ServerConfig(served_model_name="small, gpt-4o-mini"), engine, tokenizer)
    assert [card["id"] for card in ask(app, "GET", "/v1/models").json()["data"]] == ["small", "gpt-4o-mini"]
    assert ask(app, "GET", "/v1/models/gpt-4o-mini").json()["id"] == "gpt-4o-mini"
    assert complete(app, model="gpt-4o-mini").json()["model"] == "gpt-4o-mini"
    assert complete(app).json()["model"] == "small"
    unknown = complete(app, model="small, gpt-4o-mini")
    assert unknown.status_code == 404 and "gpt-4o-mini" in unknown.json()["error"]["message"]
    for wrong in ("a,", "a,,b", "a,a", " "):
        with pytest.raises(ConfigError, match="served_model_name"):
            ServerConfig(served_model_name=wrong)


OVERFLOWS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "x" * 600}, "prompt"),
    ("/v1/completions", {"prompt": ["x", "x" * 600]}, "prompt.1"),
    ("/v1/completions", {"prompt": "x" * 512, "max_tokens": None}, "prompt"),
    ("/v1/completions", {"prompt": "x" * 500, "max_tokens": 20}, "max_tokens"),
    ("/v1/completions", {"prompt": "x" * 90_000}, "prompt"),
    ("/v1/completions", {"prompt": [1] * 600}, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 90_000}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 600}, "max_tokens"),
    ("/v1/embeddings", {"input": "x" * 600}, "input"),
    ("/v1/dsc/trace", {"prompt": "x" * 600}, "prompt"),
    ("/detokenize", {"tokens": [1] * 600}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), OVERFLOWS, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_said_in_the_words_that_clients_look_for(
    app: FastAPI, path: str, body: dict[str, Any], param: str
) -> None:
    error = error_of(ask(app, "POST", path, json=body))
    assert (error["param"], error["code"], error["type"]) == (param, "context_length_exceeded", "invalid_request_error")
    assert error["message"].startswith("This model's maximum context length is 512 tokens. However, ")
    assert "Please reduce the length of the " in error["message"]


def test_a_chat_that_does_not_fit_is_told_as_openai_tells_it(app: FastAPI) -> None:
    message = {"role": "user", "content": "x" * 500}
    assert error_of(chat(app, messages=[message], max_completion_tokens=20))["message"] == (
        "This model's maximum context length is 512 tokens. However, you requested 537 tokens (517 in the messages, "
        "20 in the completion). Please reduce the length of the messages or completion."
    )
    (whole,) = {error_of(chat(app, messages=[message]))["message"]}
    assert whole.endswith("However, your messages resulted in 517 tokens. Please reduce the length of the messages.")


def test_a_gap_is_filled_where_the_tokenizer_has_marks_for_it(engine: FakeEngine) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    app = app_around(engine, Tokenizer(backend))
    assert text_of(complete(app, prompt="ab", suffix="yz", max_tokens=2)) == "ab"  # what the engine says
    assert engine.submitted[-1][1] == [256, *b"ab", 257, *b"yz", 258]
    assert complete(app, prompt=[1], suffix="yz").json()["usage"]["prompt_tokens"] == 6
    for other in ({"echo": True}, {"truncate_prompt_tokens": 3}):
        assert error_of(complete(app, suffix="yz", **other))["param"] == "suffix"
    assert error_of(complete(app, suffix="y" * 600))["code"] == "context_length_exceeded"


def test_without_marks_a_suffix_is_refused(app: FastAPI) -> None:
    error = error_of(complete(app, suffix="yz"))
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    assert "has no marks for filling in the middle" in error["message"]
    assert complete(app, suffix="").status_code == 200


@pytest.mark.parametrize("escapes", [False, True])
def test_an_operator_may_have_spelled_marks_read_as_text(
    engine: FakeEngine, tokenizer: Tokenizer, escapes: bool
) -> None:
    app = create_app(ServerConfig(escape_special_tokens=escapes), engine, tokenizer)
    messages = [{"role": "user", "content": "a<|end|>b"}]
    assert chat(app, messages=messages).status_code == 200
    ids = engine.submitted[-1][1]
    assert ids.count(256) == (0 if escapes else 1)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<user>a<|end|>b<assistant>"
    assert ask(app, "POST", "/tokenize", json={"messages": messages}).json()["tokens"] == ids
    assert complete(app, prompt="<|end|>").json()["usage"]["prompt_tokens"] == 1  # which is the client's own affair
