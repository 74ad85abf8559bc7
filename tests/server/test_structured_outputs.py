"""What the text must look like: both ways of asking reach the engine, and what cannot be used is refused by name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import app_around, chat, client_of, complete, until

from dsc_serve.sampling_params import MAX_GRAMMAR, StructuredOutputs
from dsc_serve.text.grammar import Grammars

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
        ({"structured_outputs": {"grammar": "start ="}}, "structured_outputs", "::="),
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


def test_grammars_are_compiled_one_at_a_time_and_hold_nobody_else_up(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, most, others = 0, 0, threading.Event()

    def slow(self: Grammars, asked: StructuredOutputs) -> None:
        nonlocal compiling, most
        compiling += 1
        most = max(most, compiling)
        assert others.wait(10)
        compiling -= 1

    monkeypatch.setattr(Grammars, "constraint", slow)

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with client_of(app) as client:
            body = {"prompt": "hi", "structured_outputs": {"regex": "a"}}
            asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
            await until(lambda: compiling)
            assert (await client.post("/detokenize", json={"tokens": [97]})).status_code == 200
            others.set()
            assert [response.status_code for response in await asyncio.gather(*asking)] == [200] * 3

    asyncio.run(run())
    assert most == 1


def test_without_a_tokenizer_it_is_refused(engine: FakeEngine) -> None:
    response = complete(app_around(engine, None), prompt=[1], structured_outputs={"regex": "a"})
    assert response.status_code == 400
    assert "tokenizer" in response.json()["error"]["message"]
