"""Whatever is sent, the answer is an error of the one form, and never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, client_of, complete, live, service_of

from dsc_serve.server.schema import ChatRequest, CompletionRequest
from dsc_serve.text.tokenizer import Tokenizer

JSON = {"content-type": "application/json"}
PATHS = ["/v1/completions", "/v1/chat/completions"]


def post(app: FastAPI, body: bytes, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    return ask(app, "POST", path, content=body, headers={**JSON, **headers})


def check_error(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, str | None] = response.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"{}x",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b'{"prompt": "\xff"}',
        b'{"\xff": 1}',
        b'{"prompt": "\\ud800"}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": ' + b"9" * 5000 + b"}",
        b"{'prompt': 'x'}",
        b'{"prompt": "x",}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(app: FastAPI, path: str, body: bytes) -> None:
    check_error(post(app, body, path), 400)


def test_a_body_of_nothing_but_unknown_fields_is_refused_in_good_time(app: FastAPI) -> None:
    body = json.dumps(dict.fromkeys(map(str, range(200_000)), 0)).encode()
    assert "unknown" in str(check_error(post(app, body), 400)["message"])


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-encoding": "gzip"},
    ],
)
def test_only_plain_json_is_read(app: FastAPI, headers: dict[str, str]) -> None:
    check_error(post(app, b'{"prompt": "x"}', **headers), 400)


def test_json_may_name_its_charset(app: FastAPI) -> None:
    for kind in ("application/json; charset=UTF-8", 'Application/JSON;charset="utf-8"'):
        assert post(app, b'{"prompt": "x"}', **{"content-type": kind}).status_code == 200


def test_a_route_that_does_not_exist_is_not_found(app: FastAPI) -> None:
    for path in ("/v1", "/v1//models", "/v1/rerank", "/v1/rerank/", "/page/none.js", "/" + "x" * 5000):
        assert check_error(ask(app, "GET", path), 404)["code"] == "unknown_url"


def test_a_method_that_is_not_allowed_is_answered_with_those_that_are(app: FastAPI) -> None:
    response = ask(app, "GET", "/v1/completions")
    assert "POST" in str(check_error(response, 405)["message"])
    assert response.headers["allow"] == "POST"
    check_error(ask(app, "POST", "/health"), 405)


def test_a_body_at_the_limit_is_read_and_one_beyond_it_is_not(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, tokenizer, max_body_bytes=2000)
    body = b'{"prompt": "x"}'
    assert post(app, body + b" " * (2000 - len(body))).status_code == 200
    assert check_error(post(app, body + b" " * (2001 - len(body))), 413)["code"] == "request_too_large"
    check_error(post(app, body, **{"content-length": "9" * 30}), 413)
    check_error(post(app, b"", **{"content-length": "2001", "expect": "100-continue"}), 413)


def chunks_of(count: int, size: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * size


def test_a_body_of_unknown_length_is_limited_while_it_is_read(app: FastAPI) -> None:
    async def run() -> None:
        async def body() -> AsyncIterator[bytes]:
            for part in chunks_of(20, 2**20):
                yield part

        async with live(app) as port, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{port}/v1/completions"
            check_error(await client.post(url, content=body(), headers=JSON, timeout=60), 413)

    asyncio.run(run())


def test_a_client_that_sends_more_than_is_drained_is_cut_off(engine: FakeEngine) -> None:
    app = app_around(engine, None, max_body_bytes=1024)
    received = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal received
        while True:
            received += 100
            yield b" " * 100

    async def run() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post("/v1/completions", content=endless(), headers=JSON)

    check_error(asyncio.run(run()), 413)
    assert received <= 4 * 1024 + 200


def test_a_body_that_does_not_come_is_not_waited_for(engine: FakeEngine) -> None:
    app = app_around(engine, None, body_timeout_s=0.1)

    async def run() -> bytes:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: 10\r\n\r\n{{".encode())
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answer

    assert asyncio.run(run()).startswith(b"HTTP/1.1 408 ")


def test_a_bug_is_answered_in_the_same_form(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_of(app).catalogue, "resolve", lambda *asked: 1 / 0)
    assert check_error(complete(app), 500)["type"] == "server_error"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def bodies(fields: list[str]) -> st.SearchStrategy[dict[str, object]]:
    return st.dictionaries(st.sampled_from(fields), json_values, max_size=4)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    completion=bodies(list(CompletionRequest.model_fields)),
    chat=bodies(list(ChatRequest.model_fields)),
)
def test_no_json_makes_the_server_fail(app: FastAPI, completion: dict[str, object], chat: dict[str, object]) -> None:
    for path, body in (
        (PATHS[0], completion),
        (PATHS[0], {"prompt": "x", **completion}),
        (PATHS[1], chat),
        (PATHS[1], {"messages": [{"role": "user", "content": "x"}], **chat}),
    ):
        response = post(app, json.dumps(body).encode(), path)
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            check_error(response, response.status_code)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_no_bytes_make_the_server_fail(app: FastAPI, body: bytes) -> None:
    for path in PATHS:
        check_error(post(app, body, path), 400)


def test_an_engine_that_is_down_is_said_to_be(engine: FakeEngine) -> None:
    app = app_around(engine, None)
    assert ask(app, "GET", "/health").json() == {"status": "ok"}
    engine.alive = False
    assert check_error(ask(app, "GET", "/health"), 503)["code"] == "engine_down"
    assert check_error(complete(app, prompt=[1]), 503)["code"] == "engine_down"
    assert check_error(complete(app, prompt=[1], stream=True), 503)["code"] == "engine_down"
