"""Large bodies: what they are made of is counted first, and those that are parsed hold nobody up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, live

from dsc_serve.server import json_bounds
from dsc_serve.server.errors import ApiError
from dsc_serve.text.tokenizer import Tokenizer

JSON = {"content-type": "application/json"}
SIZE = 8 * 2**20 - 100
CPU_S = 1.0  # for one body; the worst took 4.4


def filled(before: str, item: str, after: str) -> bytes:
    return (before + item * ((SIZE - len(before) - len(after)) // len(item)) + after).encode()


HEAVY = {
    "empty lists": filled('{"prompt":[', "[],", "[]]}"),
    "lists of one": filled('{"prompt":[', "[1],", "[1]]}"),
    "empty objects": filled('{"prompt":[', "{},", "{}]}"),
    "empty texts": filled('{"prompt":[', '"",', '""]}'),
    "numbers": filled('{"prompt":[', "1,", "1]}"),
    "deep": filled('{"prompt":', "[", ""),
    "stops": filled('{"prompt":"x","stop":[', '"",', '""]}'),
    "stop tokens": filled('{"prompt":"x","stop_token_ids":[', "1,", "1]}"),
    "biases": filled('{"prompt":"x","logit_bias":{', '"1":1,', '"2":1}}'),
    "schema": filled('{"prompt":"x","structured_outputs":{"json":{"enum":[', "[],", "[]]}}}"),
    "format": filled('{"prompt":"x","response_format":{"type":"json_schema","json_schema":{"a":[', "{},", "1]}}}"),
    "unsupported": filled('{"prompt":"x","suffix":[', "[],", "[]]}"),
    "unknown": filled('{"prompt":"x","unknown":[', "[],", "[]]}"),
    "unknown fields": filled('{"prompt":"x",', '"a":[],', '"a":[]}'),
    "digits": filled('{"prompt":"x","seed":', "9", "}"),
    "escapes": filled('{"prompt":"', "\\u0041", '"}'),
    "backslashes": filled('{"prompt":"', "\\\\", '"}'),
    "white space": filled('{"prompt":', " ", '"x"}'),
    "a text": filled('{"prompt":"', "x", '"}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_a_body_of_8_mb_costs_little_whatever_it_is_made_of(
    engine: FakeEngine, tokenizer: Tokenizer, name: str
) -> None:
    app = app_around(engine, tokenizer)
    used = time.process_time()
    answer = ask(app, "POST", "/v1/completions", content=HEAVY[name], headers=JSON)
    used = time.process_time() - used
    assert answer.status_code == (200 if name == "white space" else 400), answer.text
    assert used < CPU_S


@pytest.mark.parametrize(
    ("path", "before", "item", "after", "field"),
    [
        ("/v1/completions", '{"max_tokens":1,"prompt":[', "[],", "[]]}", "prompt"),
        ("/v1/chat/completions", '{"model":null,"messages":[', "{},", "{}]}", "messages"),
        ("/tokenize", '{"prompt":"x","messages":[', "{},", "{}]}", "messages"),
        ("/detokenize", '{"tokens":[', "1,", "1]}", "tokens"),
        ("/v1/dsc/trace", '{"prompt":[', "1,", "1]}", "prompt"),
    ],
)
def test_every_endpoint_counts_before_it_builds_and_names_the_field(
    app: FastAPI, path: str, before: str, item: str, after: str, field: str
) -> None:
    answer = ask(app, "POST", path, content=filled(before, item, after), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == field
    assert "at most" in error["message"] and field in error["message"]


def test_the_event_loop_does_little_between_two_turns_while_large_bodies_come(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """By its thread's processor time: whoever else uses the cores changes nothing."""
    app = app_around(engine, tokenizer)
    bodies = [HEAVY[kind] for kind in HEAVY if kind != "white space"]
    bodies += [b'{"prompt":[' + b"[]," * (2**17 - 10) + b"[]]}"] * 4  # what is still let through
    turns: list[float] = []

    async def tick() -> None:
        while True:
            start = time.thread_time()
            await asyncio.sleep(0.002)
            turns.append(time.thread_time() - start)

    async def run() -> None:
        async with live(app) as port:
            url = f"http://127.0.0.1:{port}/v1/completions"
            ticking = asyncio.create_task(tick())
            answers = await asyncio.gather(*(asyncio.to_thread(post, url, body) for body in bodies))
            ticking.cancel()
            assert {answer.status_code for answer in answers} == {400}

    asyncio.run(run())
    assert max(turns) < 0.15, sorted(turns)[-5:]


def post(url: str, body: bytes) -> httpx.Response:
    return httpx.post(url, content=body, headers=JSON, timeout=60)


def test_what_is_being_parsed_counts_as_being_read(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    check = json_bounds.check

    def noted(body: bytes, most: int) -> None:
        seen.append(app.state.reading.total())
        check(body, most)

    monkeypatch.setattr(json_bounds, "check", noted)
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    ask(app, "POST", "/v1/completions", content=body, headers=JSON)
    assert seen == [len(body)]
    assert app.state.reading.total() == 0


def test_the_limit_is_a_setting(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, tokenizer, max_body_values=1024)
    for count, status in ((400, 200), (1100, 400)):
        answer = ask(app, "POST", "/v1/completions", json={"prompt": [1] * count, "max_tokens": 1})
        assert answer.status_code == status
    assert "1024" in answer.json()["error"]["message"]


def test_what_prose_has_in_its_texts_is_not_counted(app: FastAPI) -> None:
    text = '[{,"\\"}]' * 40
    answer = ask(app, "POST", "/v1/completions", json={"prompt": text, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    json_bounds.check(json.dumps({"prompt": text * 20_000}).encode(), 1024)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.text('[]{},"\\'),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('"\\[{a', max_size=3), inner, max_size=5),
    max_leaves=30,
)  # fmt: skip


def texts_in(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(texts_in, value.values()))
    return sum(map(texts_in, value)) if isinstance(value, list) else int(isinstance(value, str))


def containers_in(value: object) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + sum(map(containers_in, inner))


def depth_of(value: object) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(values, st.booleans())
def test_the_counts_are_those_of_the_parsed_value(value: object, ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii).encode()
    outside = json_bounds.without_texts(body, 10**6, body)
    assert outside.count(b"[") + outside.count(b"{") == containers_in(value)
    assert json_bounds.depth(outside) == depth_of(value)
    if texts := texts_in(value):
        json_bounds.without_texts(body, texts, body)
        with pytest.raises(ApiError):
            json_bounds.without_texts(body, texts - 1, body)


@pytest.mark.parametrize(("depth", "allowed"), [(127, True), (128, False), (300, False)])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_lists_and_objects_have_a_depth(depth: int, opening: str, allowed: bool) -> None:
    body = ('{"x":' + opening * depth + "1" + ("]" if opening == "[" else "}") * depth + "}").encode()
    check: Callable[[], None] = lambda: json_bounds.check(body, 2**20)  # noqa: E731
    if allowed:
        check()
    else:
        with pytest.raises(ApiError, match="deep") as refused:
            check()
        assert refused.value.param == "x"
