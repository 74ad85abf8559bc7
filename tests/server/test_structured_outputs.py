"""What the text must look like: both ways of asking reach the engine, and what cannot be used is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import app_around, chat, client_of, complete, service_of, until

from dsc_serve.server.grammars import PER_KEY, WAITING_PER_KEY
from dsc_serve.server.keys import KeyRing
from dsc_serve.structured_outputs import MAX_GRAMMAR, StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.messages import GrammarChecked

Ask = Callable[..., httpx.Response]
BOTH = pytest.mark.parametrize("ask_for", [complete, chat])

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SCHEMA_TEXT = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
NAMED = {"name": "answer", "description": "d", "schema": SCHEMA, "strict": True}


@BOTH
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, StructuredOutputs(json=SCHEMA_TEXT)),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputs(json=SCHEMA_TEXT)),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, StructuredOutputs(json=SCHEMA_TEXT)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
        ({"structured_outputs": {"regex": "[ab]+"}}, StructuredOutputs(regex="[ab]+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputs(grammar='start: "a"')),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            StructuredOutputs(json_object=True, disable_any_whitespace=True),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
            StructuredOutputs(json=SCHEMA_TEXT, disable_additional_properties=True),
        ),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": "[ ]"}},
            StructuredOutputs(json_object=True, whitespace_pattern="[ ]"),
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            StructuredOutputs(regex="a"),
        ),
    ],
)
def test_it_reaches_the_engine(
    app: FastAPI, engine: FakeEngine, ask_for: Ask, fields: dict[str, Any], expected: StructuredOutputs | None
) -> None:
    response = ask_for(app, **fields)
    assert response.status_code == 200, response.text
    assert engine.submitted[0][2].structured_outputs == expected


@BOTH
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {}}, "response_format.type", "missing"),
        ({"response_format": "json_object"}, "response_format", "an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "text", "json_schema": NAMED}}, "response_format.json_schema", "may only be"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "response_format",
            "strin",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {}, "response_format": {"type": "text"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"regex": "a" * (MAX_GRAMMAR + 1)}}, "structured_outputs", str(MAX_GRAMMAR)),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "a string"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "a list"),
        ({"structured_outputs": {"grammar": "start ="}}, "structured_outputs", "start ="),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "an object or a string"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "EOF"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs", "not"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1:1/x"}}}, "structured_outputs", "127.0.0.1:1"),
        ({"structured_outputs": {"json": {"minimum": 10**400}}}, "structured_outputs", "number"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs", "for JSON"),
        ({"structured_outputs": {"regex": "a", "structural_tag": "x"}}, "structured_outputs.structural_tag", "support"),
        ({"structured_outputs": {"regex": "a", "guided": 1}}, "structured_outputs.guided", "not a field"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens", "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "one of the two",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    app: FastAPI, engine: FakeEngine, ask_for: Ask, fields: dict[str, Any], param: str, words: str
) -> None:
    response = ask_for(app, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert engine.submitted == []


def test_a_grammar_that_is_compiled_holds_no_place(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:
            body = {"prompt": "hi", "structured_outputs": {"regex": "a"}}
            places = service_of(app).permits.capacity
            asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(places + 4)]
            await until(lambda: engine.checking == places + 4)
            assert service_of(app).permits.held == 0
            for task in asking[4:]:  # clients that leave
                task.cancel()
            await until(lambda: engine.checking == 4)
            engine.gate.set()
            assert [response.status_code for response in await asyncio.gather(*asking[:4])] == [200] * 4

    asyncio.run(run())


def test_a_key_has_few_grammars_compiled_at_a_time(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    ring = KeyRing("", ",".join(f"{name}:{f'key-{name}' * 4}" for name in "ab"))
    app = app_around(engine, tokenizer, ring)

    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:

            def ask_as(key: str) -> asyncio.Task[httpx.Response]:
                body = {"prompt": "hi", "structured_outputs": {"regex": "a"}}
                headers = {"Authorization": f"Bearer {key * 4}"}
                return asyncio.create_task(client.post("/v1/completions", json=body, headers=headers))

            greedy = [ask_as("key-a") for _ in range(PER_KEY + WAITING_PER_KEY + 1)]
            refused = await greedy.pop()
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert "grammars of this key" in refused.json()["error"]["message"]
            assert engine.checking == PER_KEY
            other = ask_as("key-b")
            await until(lambda: engine.checking == PER_KEY + 1)
            engine.gate.set()
            assert (await other).status_code == 200
            await asyncio.gather(*greedy)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (GrammarChecked(0, "", full=True), 429),
        (GrammarChecked(0, "structured_outputs cannot be used: slow"), 400),
        (GrammarChecked(0, "structured_outputs cannot be used now: the process has ended", lost=True), 503),
    ],
)
def test_what_the_engine_says_of_a_grammar_is_told(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, answer: GrammarChecked, status: int
) -> None:
    async def check_grammar(asked: StructuredOutputs) -> GrammarChecked:
        return answer

    monkeypatch.setattr(engine, "check_grammar", check_grammar)
    response = complete(app, structured_outputs={"regex": "a"})
    assert response.status_code == status
    assert engine.submitted == []


@pytest.mark.parametrize("own", [{"timeout_s": 0.05}, {"dsc": {"deadline_ms": 50}}], ids=str)
def test_a_grammar_takes_no_longer_than_its_request_may(app: FastAPI, engine: FakeEngine, own: dict[str, Any]) -> None:
    async def run() -> httpx.Response:
        engine.gate = asyncio.Event()  # nobody says whether it can be used
        async with client_of(app) as client:
            return await client.post(
                "/v1/completions", json={"prompt": "hi", "structured_outputs": {"regex": "a"}, **own}
            )

    response = asyncio.run(run())
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (408, "timeout") and "0.05 s" in error["message"]
    assert engine.submitted == [] and engine.checking == 0 and service_of(app).permits.held == 0


def test_without_a_tokenizer_it_is_refused(engine: FakeEngine) -> None:
    response = complete(app_around(engine, None), prompt=[1], structured_outputs={"regex": "a"})
    assert response.status_code == 400
    assert "tokenizer" in response.json()["error"]["message"]
