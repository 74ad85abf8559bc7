"""chat_template_kwargs: what a chat template reads beside the messages, where it acts and where it is refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine, saying
from support.serving import MESSAGES, app_around, ask, chat
from support.tool_chats import prompt_of, templated

from dsc_serve.config import ServerConfig
from dsc_serve.server.app import create_app
from dsc_serve.text.sandbox import variables_in
from dsc_serve.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% macro shown(text) %}<{{ text }}>{% endmacro %}"
    "{% if not tone is defined %}{% set tone = 'plain' %}{% endif %}"
    "{% for message in messages %}{{ shown(message.content) }}{% endfor %}{{ tone }}"
    "{% for document in documents or [] %}[{{ document.title }}]{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% if add_generation_prompt %}{{ bos_token }}<assistant>{% endif %}"
)
SAID = "<hi>plain<assistant>"


@pytest.fixture
def app(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    engine.script = saying("Yes.")
    return app_around(engine, templated(tokenizer, TEMPLATE))


def respond(app: FastAPI, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/responses", json={"input": "hi", **fields})


def test_only_what_a_template_reads_may_be_set() -> None:
    assert variables_in(TEMPLATE) == {"tone", "documents", "enable_thinking", "bos_token"}
    assert variables_in("{% set a = 1 %}{{ messages }}{{ tools }}{{ range(3) }}{{ raise_exception }}") == frozenset()
    assert variables_in("{% for a, b in pairs %}{{ a }}{{ loop.index }}{% endfor %}") == {"pairs"}
    assert variables_in("{% set a = a or 1 %}{{ a }}{% set b = namespace(x=1) %}{{ b.x }}") == {"a"}
    assert variables_in("{% if c %}{% set d = 1 %}{% endif %}{{ d }}") == {"c", "d"}
    assert variables_in("{% broken") == frozenset()


@pytest.mark.parametrize("send", [chat, respond])
@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (None, SAID),
        ({}, SAID),
        ({"tone": "warm"}, "<hi>warm<assistant>"),
        ({"enable_thinking": False}, "<hi>plain<think></think><assistant>"),
        ({"enable_thinking": True}, SAID),
        ({"documents": [{"title": "A"}, {"title": "B"}]}, "<hi>plain[A][B]<assistant>"),
    ],
    ids=str,
)
def test_they_reach_the_template(
    app: FastAPI, engine: FakeEngine, send: Any, given: dict[str, Any] | None, prompt: str
) -> None:
    response = send(app, chat_template_kwargs=given)
    assert response.status_code == 200, response.text
    assert prompt_of(engine) == prompt


def test_tokenize_counts_what_a_chat_would_send(app: FastAPI) -> None:
    fields = {"messages": MESSAGES, "chat_template_kwargs": {"tone": "warm"}}
    answer = ask(app, "POST", "/tokenize", json=fields).json()
    assert bytes(answer["tokens"]).decode() == "<hi>warm<assistant>"
    refused = ask(app, "POST", "/tokenize", json={"prompt": "hi", "chat_template_kwargs": {"tone": "warm"}})
    assert refused.json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("send", [chat, respond])
@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"thinking": True}, "chat_template_kwargs.thinking", "does not read it"),
        ({"messages": []}, "chat_template_kwargs.messages", "allowed: bos_token, documents"),
        ({"add_generation_prompt": False}, "chat_template_kwargs.add_generation_prompt", "a field of its own"),
        ({"message": "x"}, "chat_template_kwargs.message", "does not read it"),
        ({"text": "x"}, "chat_template_kwargs.text", "does not read it"),
        ("tone", "chat_template_kwargs", "an object"),
    ],
    ids=str,
)
def test_others_are_refused_by_name(
    app: FastAPI, engine: FakeEngine, send: Any, given: object, param: str, words: str
) -> None:
    response = send(app, chat_template_kwargs=given)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error
    assert engine.submitted == []


def test_a_special_token_spelled_in_one_is_escaped_with_the_rest(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name="fake", escape_special_tokens=True)
    app = create_app(config, engine, templated(tokenizer, TEMPLATE), None)
    response = chat(app, chat_template_kwargs={"tone": "<|end|>"}, max_tokens=1)
    assert response.status_code == 200, response.text
    assert 256 not in engine.submitted[0][1] and "<|end|>" in prompt_of(engine)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**100], ids=["above", "below", "long"])
@pytest.mark.parametrize("where", ["chat_template_kwargs", "tools", "messages"])
def test_whole_numbers_that_templates_cannot_hold_are_the_requests_fault(
    app: FastAPI, engine: FakeEngine, where: str, number: int
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": number}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": f'{{"x": {number}}}'}}
    fields: dict[str, Any] = {
        "chat_template_kwargs": {"chat_template_kwargs": {"documents": [{"title": number}]}},
        "tools": {"tools": [tool]},
        "messages": {"messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}, *MESSAGES]},
    }[where]
    response = ask(app, "POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1, **fields})
    assert response.status_code in (200, 400), response.text
    assert (where, response.status_code) != ("chat_template_kwargs", 200)
    if response.status_code == 400:
        assert "64 bits" in response.json()["error"]["message"] and engine.submitted == []
    assert ask(app, "POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}).status_code == 200
