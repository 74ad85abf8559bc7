"""POST /v1/embeddings, around an engine whose vectors say the prompt's size and its first token."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import MAX_RUNNING, MAX_WAITING, app_around, ask, client_of, service_of

from dsc_serve.pooling import Pooling
from dsc_serve.server.keys import KeyRing
from dsc_serve.text.tokenizer import Tokenizer

PATH = "/v1/embeddings"


def embed(app: FastAPI, text: Any, **fields: Any) -> httpx.Response:
    return ask(app, "POST", PATH, json={"input": text, **fields})


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", [[3, 97, 0, 0]]),
        (["abc", "d"], [[3, 97, 0, 0], [1, 100, 0, 0]]),
        ([7, 8], [[2, 7, 0, 0]]),
        ([[7, 8], [9]], [[2, 7, 0, 0], [1, 9, 0, 0]]),
    ],
)
def test_every_form_of_input_has_its_vectors(app: FastAPI, text: Any, expected: list[list[float]]) -> None:
    response = embed(app, text)
    assert vectors(response) == expected
    used = sum(int(vector[0]) for vector in expected)
    body = response.json()
    assert (body["object"], body["model"]) == ("list", "fake")
    assert body["usage"] == {"prompt_tokens": used, "total_tokens": used}


def test_an_embedding_asks_the_engine_for_no_token(app: FastAPI, engine: FakeEngine) -> None:
    embed(app, "abc")
    assert engine.submitted[0][2].max_tokens == 0


def test_vectors_are_cut_and_packed_as_asked(app: FastAPI) -> None:
    assert vectors(embed(app, "abc", dimensions=2)) == [[3, 97]]
    (packed,) = vectors(embed(app, "abc", encoding_format="base64"))
    assert np.frombuffer(base64.b64decode(str(packed)), "<f4").tolist() == [3, 97, 0, 0]
    assert vectors(embed(app, "abc", encoding_format="float", truncate_prompt_tokens=2)) == [[2, 98, 0, 0]]


def test_openais_client_reads_them(app: FastAPI) -> None:
    async def run() -> openai.types.CreateEmbeddingResponse:
        async with client_of(app) as http:
            client = openai.AsyncOpenAI(api_key="none", base_url="http://server/v1", http_client=http)
            return await client.embeddings.create(model="fake", input=["abc", "d"], user="me")

    answer = asyncio.run(run())
    assert [entry.embedding for entry in answer.data] == [[3, 97, 0, 0], [1, 100, 0, 0]]


def test_more_texts_than_places_take_turns(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, tokenizer)
    most = 0
    before = engine.generate

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal most
        most = max(most, engine.running)
        return before(*arguments, **named)

    engine.generate = counted  # type: ignore[method-assign]
    count = 5 * (MAX_RUNNING + MAX_WAITING)
    assert len(vectors(embed(app, [f"{i}" for i in range(count)]))) == count
    assert most <= MAX_RUNNING + MAX_WAITING
    assert service_of(app).permits.held == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a", 5]}, "input.1"),
        ({"input": [[1], [300]]}, "input.1"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "dimensions": 5}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": "3"}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "temperature": 1}, "temperature"),
        ({"input": "x", "store": True}, "store"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded_is_named(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    response = ask(app, "POST", PATH, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_checkpoint_whose_pooling_is_not_supported_says_so(app: FastAPI, engine: FakeEngine) -> None:
    engine.pooling = Pooling(fault="this checkpoint pools by cls_token, which is not supported")
    error = embed(app, "x").json()["error"]
    assert error["param"] == "model" and "cls_token" in error["message"]


def test_a_failure_of_one_text_is_that_of_all(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 0
    assert embed(app, ["a", "b"]).status_code == 500
    assert 'dsc_serve_embeddings_total{outcome="error"} 2' in ask(app, "GET", "/metrics").text


def test_embeddings_are_counted_as_such(app: FastAPI) -> None:
    embed(app, ["a", "bc"])
    scraped = ask(app, "GET", "/metrics").text
    assert 'dsc_serve_embeddings_total{outcome="done"} 2' in scraped
    assert "dsc_serve_prompt_tokens_total 3" in scraped
    assert 'dsc_serve_generations_total{finish_reason="length"} 0' in scraped


def test_the_tokens_of_a_key_pay_for_texts(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, tokenizer, KeyRing("", "me:" + "k" * 16), tokens_per_minute=10)
    headers = {"authorization": "Bearer " + "k" * 16}

    def status(text: str) -> int:
        return ask(app, "POST", PATH, json={"input": text}, headers=headers).status_code

    assert [status("x" * size) for size in (11, 6, 5, 4)] == [400, 200, 429, 200]
    assert ask(app, "POST", PATH, json={"input": "x"}).status_code == 401
