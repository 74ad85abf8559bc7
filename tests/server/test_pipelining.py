"""Requests that do not wait for answers: a few are queued, the rest stays with the client, and none is lost."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import app_around, live, post_bytes, service_of, until

from dsc_serve.server.protocol import MAX_QUEUED, SLICE, HttpConnection

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
FIELDS = {"prompt": [1], "max_tokens": 3}
POST = post_bytes("/v1/completions", FIELDS)
LONGEST_READ = 2**18
BAD = b"GET / HTTP/1.1\r\nbad header\r\n\r\n"


class Queue(deque[Any]):
    """Notes how long it has been: between two looks at it requests come and are answered."""

    longest = 0

    def appendleft(self, one: Any) -> None:
        super().appendleft(one)
        self.longest = max(self.longest, len(self))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections whose queue is a `Queue`."""
    begin = HttpConnection.connection_made

    def made(self: HttpConnection, transport: asyncio.Transport) -> None:
        self.pipeline = Queue()
        begin(self, transport)

    monkeypatch.setattr(HttpConnection, "connection_made", made)


def connection_of(app: FastAPI) -> HttpConnection:
    (connection,) = app.state.server.server_state.connections
    assert isinstance(connection, HttpConnection)
    return connection


@contextlib.asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with live(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


@pytest.mark.parametrize(
    "request_bytes",
    [
        GET,
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
        post_bytes("/v1/completions", {"prompt": "x" * 60_000}),
        GET[:-2] + b"".join(b"A%d:\r\n" % i for i in range(200)) + b"\r\n",
        b"POST /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ],
    ids=["get", "tiny", "large bodies", "many headers", "chunked"],
)
@pytest.mark.usefixtures("noted")
def test_what_nobody_reads_the_answers_of_is_not_taken_in(engine: FakeEngine, request_bytes: bytes) -> None:
    app = app_around(engine, None, max_requests_per_connection=0)
    count = max(60, min(4000, 2_000_000 // len(request_bytes)))

    async def run() -> None:
        async with connected(app) as (reader, writer):
            sending = asyncio.create_task(send(writer, request_bytes * count))
            await until(lambda: app.state.server.server_state.connections)
            connection = connection_of(app)
            most_kept = 0
            for _ in range(50):
                await asyncio.sleep(0.01)
                queued = sum(len(cycle.body) for cycle, _ in connection.pipeline)
                most_kept = max(most_kept, queued + len(connection._rest))
            assert isinstance(connection.pipeline, Queue)
            assert 0 < connection.pipeline.longest <= MAX_QUEUED + SLICE // 16
            assert most_kept <= 2 * LONGEST_READ
            for _ in range(count):  # and now it reads: all are answered
                await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 "), 20)
            await sending

    asyncio.run(run())


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 2**16):
        writer.write(data[start : start + 2**16])
        await writer.drain()


@pytest.mark.parametrize("cut", [0, len(GET) + 5, 2 * len(GET) + len(POST) - 3])
def test_a_connection_ends_with_the_last_request_that_it_may_bring(engine: FakeEngine, cut: int) -> None:
    app = app_around(engine, None, max_requests_per_connection=5)
    data = GET * 2 + POST * 20

    async def run() -> bytes:
        async with connected(app) as (reader, writer):
            writer.write(data[:cut])
            await asyncio.sleep(0.02)
            writer.write(data[cut:])
            return await asyncio.wait_for(read_all(reader), 10)

    answer = asyncio.run(run())
    heads = [part.partition(b"\r\n\r\n")[0] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert [b"connection: close" in head for head in heads] == [False] * 4 + [True]
    assert len(engine.submitted) == 3


def test_without_a_limit_a_connection_brings_any_number(engine: FakeEngine) -> None:
    app = app_around(engine, None, max_requests_per_connection=0)

    async def run() -> None:
        async with connected(app) as (reader, writer):
            for _ in range(1100):
                writer.write(GET)
                assert (await reader.readuntil(b'"ok"}')).startswith(b"HTTP/1.1 200 ")

    asyncio.run(run())


@pytest.mark.parametrize("bad", [BAD, b"\x00", GET.replace(b"Host: x", b"A: b"), POST[:80] + b"\x00"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_behind_a_request_is_said_after_its_answer(engine: FakeEngine, bad: bytes, stream: bool) -> None:
    engine.delay_s = 0.02
    first = post_bytes("/v1/completions", {**FIELDS, "stream": stream})

    async def run() -> bytes:
        async with connected(app_around(engine, None)) as (reader, writer):
            writer.write(first + GET + bad + GET)
            return await asyncio.wait_for(read_all(reader), 10)

    answer = asyncio.run(run())
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"400"]
    assert (b"[DONE]" in answer) == stream


def test_a_queued_request_whose_body_is_broken_is_not_answered_but_those_before_it(engine: FakeEngine) -> None:
    engine.delay_s = 0.02
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def run() -> bytes:
        async with connected(app_around(engine, None)) as (reader, writer):
            writer.write(POST + chunked + b"1\r\na\r\nnonsense\r\n")
            return await asyncio.wait_for(read_all(reader), 10)

    assert re.findall(rb"HTTP/1.1 (\d+)", asyncio.run(run())) == [b"200", b"400"]
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_is_not_read_is_noticed(engine: FakeEngine, stream: bool) -> None:
    engine.gate = asyncio.Event()
    app = app_around(engine, None)

    async def run() -> None:
        async with connected(app) as (_, writer):
            writer.write(post_bytes("/v1/completions", {**FIELDS, "stream": stream}) + GET * 100)
            await until(lambda: engine.running == 1)
            assert connection_of(app).flow.read_paused
            writer.close()
            await until(lambda: len(engine.aborted) == 1)
            await until(lambda: service_of(app).permits.held == 0)

    asyncio.run(run())


def test_a_server_that_ends_finishes_the_answer_and_none_behind_it(engine: FakeEngine) -> None:
    engine.delay_s = 0.1
    app = app_around(engine, None)

    async def run() -> bytes:
        async with connected(app) as (reader, writer):
            writer.write(POST * 100)
            await until(lambda: engine.running == 1)
            app.state.server.should_exit = True
            return await asyncio.wait_for(read_all(reader), 10)

    assert re.findall(rb"HTTP/1.1 (\d+)", asyncio.run(run())) == [b"200"]
    assert len(engine.submitted) == 1


async def read_all(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(10_000):
            answer += part
    return answer
