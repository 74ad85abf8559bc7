"""POST /tokenize and /detokenize, GET /version."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import MESSAGES, app_around, ask

from dsc_serve import __version__
from dsc_serve.server import service


def post(app: FastAPI, path: str, **fields: Any) -> Any:
    response = ask(app, "POST", path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prompt_is_tokenised_as_a_completion_sees_it(app: FastAPI) -> None:
    body = post(app, "/tokenize", prompt="hé", model="fake")
    assert body == {"count": 3, "max_model_len": 512, "tokens": [104, 195, 169], "token_strs": None}
    assert post(app, "/tokenize", prompt="")["tokens"] == []


def test_token_texts_are_told_on_request(app: FastAPI) -> None:
    body = post(app, "/tokenize", prompt="hé", return_token_strs=True)
    assert body["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]


def test_the_texts_of_token_ids_are_told_on_request(app: FastAPI) -> None:
    body = post(app, "/detokenize", tokens=[104, 195, 169, 256], return_token_strs=True)
    assert body == {"prompt": "hé<|end|>", "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9", "<|end|>"]}
    assert post(app, "/detokenize", tokens=[104], return_token_strs=False) == {"prompt": "h"}


def test_messages_are_tokenised_as_a_chat_sees_them(app: FastAPI, engine: FakeEngine) -> None:
    tokens = post(app, "/tokenize", messages=MESSAGES)["tokens"]
    ask(app, "POST", "/v1/chat/completions", json={"messages": MESSAGES})
    assert tokens == engine.submitted[0][1]
    assert bytes(post(app, "/tokenize", messages=MESSAGES, add_generation_prompt=False)["tokens"]) == b"<user>hi"


def test_text_and_tokens_are_each_other_s_inverse(app: FastAPI) -> None:
    for text in ("", "Grüße 😀", "<|end|>"):
        tokens = post(app, "/tokenize", prompt=text)["tokens"]
        assert post(app, "/detokenize", tokens=tokens, model="fake") == {"prompt": text}


def test_the_version_is_the_package_s(app: FastAPI) -> None:
    assert ask(app, "GET", "/version").json() == {"version": __version__}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "\\ud800"}, None),
        ("/tokenize", {"prompt": "x" * 9999}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "text": "x"}, "text"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens.1"),
        ("/detokenize", {"tokens": [300]}, "tokens.0"),
        ("/detokenize", {"tokens": [0] * 513}, "tokens"),
        ("/detokenize", {"tokens": [0, -1]}, "tokens.1"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(app: FastAPI, path: str, fields: dict[str, Any], param: str | None) -> None:
    if param is None:  # not representable by the client's encoder
        body = b'{"prompt": "\\ud800"}'
        response = ask(app, "POST", path, content=body, headers={"content-type": "application/json"})
    else:
        response = ask(app, "POST", path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_texts_that_wait_to_be_tokenised_have_a_limit(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_LOW_PRIORITY", 0)
    monkeypatch.setattr(service, "LONG_TEXT", 2)
    for path, fields in (("/tokenize", {"prompt": "long"}), ("/detokenize", {"tokens": [97]})):
        response = ask(app, "POST", path, json=fields)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1"
    assert ask(app, "POST", "/v1/completions", json={"prompt": "long", "max_tokens": 2}).status_code == 200


def test_another_model_is_not_found(app: FastAPI) -> None:
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert ask(app, "POST", path, json={**fields, "model": "other"}).status_code == 404


def test_without_a_tokenizer_there_is_nothing_to_do(engine: FakeEngine) -> None:
    app = app_around(engine, None)
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        response = ask(app, "POST", path, json=fields)
        assert response.status_code == 400
        assert "no tokenizer" in response.json()["error"]["message"]
