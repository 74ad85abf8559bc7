"""POST /v1/chat/completions: what comes back for what was asked."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine, saying
from support.serving import MESSAGES, app_around, ask, chat, events_of

from dsc_serve.text.broken_template import BrokenTemplate
from dsc_serve.text.tokenizer import Tokenizer


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.submitted[0][1]).decode()


def test_a_chat_completion_has_the_shape_of_openais(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("hello")
    body = chat(app).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    prompt_tokens = len("<user>hi<assistant>")
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 5,
            "total_tokens": prompt_tokens + 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert prompt_of(engine) == "<user>hi<assistant>"


def test_roles_and_text_parts_reach_the_template(app: FastAPI, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": "A", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "B"},
    ]
    assert chat(app, messages=messages).status_code == 200
    assert prompt_of(engine) == "<system>S<system>D<user>one\ntwo<assistant>A<user>B<assistant>"


def test_a_chat_may_go_on_to_the_context_s_end(app: FastAPI, engine: FakeEngine) -> None:
    body = chat(app).json()
    assert engine.submitted[0][2].max_tokens is None
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == engine.capacity.max_tokens


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
def test_both_names_of_the_limit_act(app: FastAPI, fields: dict[str, int]) -> None:
    assert chat(app, **fields).json()["choices"][0]["message"]["content"] == "abc"


def test_the_role_comes_first_and_the_reason_last(app: FastAPI) -> None:
    events = events_of(chat(app, stream=True, max_tokens=2))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert all("usage" not in event for event in events)


def test_an_answer_without_text_still_has_its_role_and_reason(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("")
    deltas = [event["choices"][0] for event in events_of(chat(app, stream=True))]
    assert [choice["finish_reason"] for choice in deltas] == [None, "stop"]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert chat(app).json()["choices"][0]["message"]["content"] == ""


def test_usage_comes_last_when_asked_for(app: FastAPI) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}
    *events, last = events_of(chat(app, **fields))
    assert [event["usage"] for event in events] == [None] * 4
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)


def test_streamed_pieces_add_up_to_the_whole(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("Grüße, 世界! 😀 bye")
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "stop": "bye", "n": 2}
    whole = chat(app, **fields).json()["choices"]
    events = [event["choices"][0] for event in events_of(chat(app, stream=True, **fields))]
    for index in (0, 1):
        own = [choice for choice in events if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Grüße, 世界! 😀 "
        assert whole[index]["message"]["content"] == "Grüße, 世界! 😀 "
        streamed = [entry for choice in own if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert streamed == whole[index]["logprobs"]["content"]
        assert len(streamed) == len("Grüße, 世界! 😀 bye".encode())


def test_logprobs_name_tokens_and_their_bytes(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("é")
    content = chat(app, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    top = [{"token": "a", "logprob": -1.0, "bytes": [97]}]
    assert content == [
        {"token": "bytes:\\xc3", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},
        {"token": "bytes:\\xa9", "logprob": -0.5, "bytes": [0xA9], "top_logprobs": top},
    ]
    assert chat(app, logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert chat(app, logprobs=False, max_tokens=1).json()["choices"][0]["logprobs"] is None


def test_messages_that_the_template_refuses_are_the_client_s_error(app: FastAPI) -> None:
    response = chat(app, messages=[{"role": "user", "content": "refuse me"}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert "these messages are refused" in response.json()["error"]["message"]


def test_a_model_without_tokenizer_or_template_cannot_chat(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    templateless = Tokenizer(tokenizer._backend, eos_token_id=256)
    for app, missing in ((app_around(engine, None), "tokenizer"), (app_around(engine, templateless), "chat template")):
        response = chat(app)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
        assert f"no {missing}" in response.json()["error"]["message"]


def test_no_alternatives_to_log_probabilities_that_nobody_asked_for_are_nothing_to_refuse(app: FastAPI) -> None:
    for fields in ({"top_logprobs": 0}, {"top_logprobs": 0, "logprobs": False}):
        response = chat(app, max_tokens=2, **fields)
        assert response.status_code == 200
        assert response.json()["choices"][0]["logprobs"] is None


def test_a_broken_template_fails_chats_and_nothing_else(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", BrokenTemplate("chat template, line 3: unknown tag 'x'"))
    app = app_around(engine, tokenizer)
    fault = "messages cannot be used: this model's chat template is broken: chat template, line 3: unknown tag 'x'"
    for answer in (chat(app), ask(app, "POST", "/tokenize", json={"messages": MESSAGES})):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["message"], error["param"]) == (fault, "messages")
    assert engine.submitted == []
    engine.script = saying("fine")
    assert ask(app, "POST", "/v1/completions", json={"prompt": "hi"}).json()["choices"][0]["text"] == "fine"
