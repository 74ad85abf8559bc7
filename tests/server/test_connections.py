"""Connections that send nothing, too much, too slowly, or read nothing: none is kept for longer than its limit."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from pathlib import Path

import pytest
from fastapi import FastAPI
from support.certificates import make_certificate
from support.fake_engine import FakeEngine
from support.serving import app_around, live, post_bytes, service_of, until

from dsc_serve.config import ConfigError, LimitConfig, ServerConfig
from dsc_serve.server.process import tls_context

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
SEND_TIMEOUT_S, BUFFER = 1.0, 2**15
POST = post_bytes("/v1/completions", {"prompt": [1], "max_tokens": 3})


def impatient(engine: FakeEngine) -> FastAPI:
    return app_around(
        engine,
        None,
        header_timeout_s=0.3,
        keep_alive_s=1,
        body_timeout_s=0.3,
        send_timeout_s=0.4,
        max_header_bytes=2048,
    )


async def said(app: FastAPI, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    async with live(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reading = asyncio.create_task(read_all(reader))
        for part in parts:
            if reading.done():
                break
            writer.write(part)
            await asyncio.sleep(pause_s)
        answer = await asyncio.wait_for(reading, 60)
        writer.close()
        return answer


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """All until the end, be it a reset: who still sends when the server closes gets one."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(10_000):
            answer += part
    return answer


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b""], 408),
        ([b"\r\n"], 408),
        ([b"GE"], 408),
        ([GET], 408),
        ([POST[:-3]], 408),
        ([b"G", b"E", b"T", b" /", b"he"], 408),
        ([b"\x16\x03\x01\x02\x00"], 400),
        ([b"GET / SPDY/9\r\n\r\n"], 400),
        ([b"GET /\xff\xfe HTTP/1.1\r\n\r\n"], 400),
        ([b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"], 400),
        ([b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"], 400),
        ([b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"], 400),
        ([GET + b"A: " + b"x" * 3000 + b"\r\n\r\n"], 431),
        ([GET + b"A: b\r\n" * 600 + b"\r\n"], 431),
        ([GET + b"A: ", *[b"x" * 500] * 10], 431),
        ([b"GET /" + b"x" * 3000 + b" HTTP/1.1\r\n\r\n"], 431),
    ],
    ids=range(16),
)
def test_a_connection_without_a_request_ends_with_the_reason(
    engine: FakeEngine, parts: list[bytes], status: int
) -> None:
    answer = asyncio.run(said(impatient(engine), *parts, pause_s=0.02))
    last = answer[answer.rindex(b"HTTP/1.1 ") :]
    assert last.startswith(b"HTTP/1.1 %d " % status), answer
    head, _, body = last.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b'"error":{"message":' in body


def test_slow_pieces_within_the_time_are_a_request(engine: FakeEngine) -> None:
    pieces = [POST[i : i + 1] for i in range(len(POST))]
    app = app_around(engine, None, header_timeout_s=20, keep_alive_s=1)
    assert asyncio.run(said(app, *pieces)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_a_request_that_offers_another_protocol_is_answered_in_this_one(
    engine: FakeEngine, framing: str, pause_s: float
) -> None:
    """As the HTTP client of Java does with every request, unless told otherwise."""
    head, _, body = POST.partition(b"\r\n\r\n")
    head += b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n\r\n"
    if framing == "chunked":
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    parts = [head, body[:9], body[9:] + POST] if pause_s else [head + body + POST]
    answer = asyncio.run(said(app_around(engine, None, keep_alive_s=20), *parts, pause_s=pause_s))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == len(engine.submitted) == 1
    assert b"connection: close" in answer.partition(b"\r\n\r\n")[0].lower()


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_offer_of_another_protocol_without_a_body_is_a_request_too(engine: FakeEngine, protocol: bytes) -> None:
    request = GET + b"Connection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocol
    assert asyncio.run(said(app_around(engine, None, keep_alive_s=20), request)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("path", "status"), [(b"/health", 200), (b"/v1/completions", 405), (b"/nothing", 404)])
def test_the_head_of_an_answer_can_be_asked_for(engine: FakeEngine, path: bytes, status: int) -> None:
    request = b" %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path
    head, whole = (asyncio.run(said(app_around(engine, None), method + request)) for method in (b"HEAD", b"GET"))
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert head.endswith(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)\r\n", head)
    assert length is not None and int(length[1]) == len(whole.partition(b"\r\n\r\n")[2]) > 0


def test_a_client_cannot_stretch_the_time_for_its_headers(engine: FakeEngine) -> None:
    pieces = [b"%c" % byte for byte in GET]
    answer = asyncio.run(said(impatient(engine), *pieces, pause_s=0.03))
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_requests_on_one_connection_are_timed_one_by_one(engine: FakeEngine) -> None:
    async def run() -> None:
        async with live(impatient(engine)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(4):
                writer.write(POST)
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}}}")
                await asyncio.sleep(0.2)
            writer.close()

    asyncio.run(run())


def test_a_large_body_is_not_taken_for_headers(engine: FakeEngine) -> None:
    app = app_around(engine, None, max_header_bytes=2048)
    body = post_bytes("/v1/completions", {"prompt": [1] * 3000})
    last = body.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    refused = post_bytes("/nothing", {"prompt": [1] * 100_000})
    answer = asyncio.run(said(app, refused + last))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"404", b"400"]


CHUNKED = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"prompt": [1], "max_tokens": 3}'
TRAILERS = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + b"GET /health/live HTTP/1.1\r\nA: ", None),
        (CHUNKED % b"/v1/completions" + TRAILERS + b"A: ", None),
        (CHUNKED % b"/unknown" + TRAILERS + b"A: ", 404),
    ],
    ids=["behind a request that runs", "behind a body", "behind the body of a request that was refused"],
)
def test_headers_have_a_limit_wherever_they_come(engine: FakeEngine, sent: bytes, status: int | None) -> None:
    engine.gate = asyncio.Event()  # nothing is answered until it opens
    app = app_around(engine, None, max_header_bytes=2048)

    async def run() -> tuple[bytes, int]:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            reading, parts = asyncio.create_task(read_all(reader)), 0
            while not reading.done() and parts < 100:
                with contextlib.suppress(ConnectionError):
                    writer.write(b"x" * 500)
                    await writer.drain()
                await asyncio.sleep(0.01)
                parts += 1
            assert engine.gate is not None
            engine.gate.set()
            return await asyncio.wait_for(reading, 60), parts

    answer, parts = asyncio.run(run())
    assert parts < 100, "it was read without end"
    assert status is None or b"HTTP/1.1 %d" % status in answer


def test_the_end_of_a_body_that_nobody_waited_for_begins_no_request(engine: FakeEngine) -> None:
    app = app_around(engine, None, header_timeout_s=0.2, keep_alive_s=1)
    head, body = post_bytes("/unknown", {"prompt": "x" * 50}).split(b"\r\n\r\n")

    async def run() -> bytes:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + b"\r\n\r\n" + body[:10])
            await reader.readuntil(b"}}")
            writer.write(body[10:])
            return await asyncio.wait_for(read_all(reader), 10)

    assert asyncio.run(run()) == b"", "no 408 on a connection that rests"


def test_connections_beyond_the_limit_are_closed_at_once_and_the_others_served(engine: FakeEngine) -> None:
    app = app_around(engine, None, max_connections=3)

    async def run() -> None:
        async with live(app) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for _ in range(5):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(POST)
                    await reader.readexactly(1)
            for reader, writer in held:
                writer.write(POST)
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
                writer.close()

    asyncio.run(run())


def test_a_client_that_leaves_its_answer_unread_is_hung_up_on_though_the_answer_is_over(engine: FakeEngine) -> None:
    async def run() -> None:
        app = impatient(engine)
        async with live(app, send_buffer=4096) as port:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(POST * 100)  # answered one after the other, into buffers that nobody empties
            await until(lambda: len(engine.submitted) > 3)
            connections = app.state.server.server_state.connections
            await until(lambda: not connections, 15)
            client.close()
        assert service_of(app).permits.held == 0

    asyncio.run(run())


@pytest.mark.parametrize("ending", [b"keep-alive", b"close"])
def test_a_client_that_reads_steadily_gets_a_large_answer_whole(engine: FakeEngine, ending: bytes) -> None:
    fields = {"prompt": [1], "max_tokens": 500, "logprobs": 20, "n": 5}
    request = post_bytes("/v1/completions", fields).replace(b"\r\n", b"\r\nConnection: %b\r\n" % ending, 1)

    async def run() -> float:
        loop = asyncio.get_running_loop()
        async with live(app_around(engine, None, send_timeout_s=SEND_TIMEOUT_S), send_buffer=BUFFER) as port:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", port))
                await loop.sock_sendall(client, request)
                answer = await loop.sock_recv(client, BUFFER)
                head, _, _ = answer.partition(b"\r\n\r\n")
                found = re.search(rb"content-length: (\d+)", head)
                assert found is not None
                begun = loop.time()
                while len(answer) < len(head) + 4 + int(found[1]):
                    await asyncio.sleep(0.05)
                    part = await loop.sock_recv(client, BUFFER)
                    assert part, "hung up on"
                    answer += part
                return loop.time() - begun

    assert asyncio.run(run()) > 2 * SEND_TIMEOUT_S


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_with_a_certificate_the_server_speaks_https(engine: FakeEngine, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    app = app_around(engine, None)
    app.state.config = ServerConfig(tls_cert=cert, tls_key=key)
    context = ssl.create_default_context(cafile=cert)

    async def run() -> None:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            writer.write(POST)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", GET + b"\r\n"], ids=["silent", "half a hello", "no TLS"])
def test_handshakes_count_as_connections_and_have_no_more_time_than_headers(
    engine: FakeEngine, certificate: tuple[str, str], sent: bytes
) -> None:
    cert, key = certificate
    app = app_around(engine, None)
    limits = LimitConfig(max_connections=3, header_timeout_s=1.0)
    app.state.config = ServerConfig(tls_cert=cert, tls_key=key, limits=limits)
    context = ssl.create_default_context(cafile=cert)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with live(app) as port:
            visitors = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
            for _, writer in visitors:
                writer.write(sent)
            start = loop.time()
            ends = [asyncio.create_task(read_all(reader)) for reader, _ in visitors]
            await until(lambda: sum(end.done() for end in ends) >= 7)
            assert len(app.state.server._handshakes) <= 3
            assert await asyncio.wait_for(asyncio.gather(*ends), 60) == [b""] * 10
            assert loop.time() - start < 20  # asyncio alone gives a handshake a minute
            assert not app.state.server._handshakes
            for _ in range(4):  # and all places are free again
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="localhost"
                )
                writer.write(POST.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
                await read_all(reader)
                writer.close()

    asyncio.run(run())


def test_a_server_that_ends_waits_for_no_handshake(engine: FakeEngine, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    app = app_around(engine, None)
    app.state.config = ServerConfig(tls_cert=cert, tls_key=key)

    async def run() -> float:
        async with live(app) as port:
            reader, _ = await asyncio.open_connection("127.0.0.1", port)
            await until(lambda: app.state.server._handshakes)
            ended = asyncio.get_running_loop().time()
        assert await read_all(reader) == b""
        return asyncio.get_running_loop().time() - ended

    assert asyncio.run(run()) < 20  # asyncio alone gives a handshake a minute


def test_certificates_that_cannot_be_used_are_named(certificate: tuple[str, str]) -> None:
    cert, key = certificate
    assert tls_context(ServerConfig(tls_cert=cert, tls_key=key)) is not None
    assert tls_context(ServerConfig()) is None
    for bad in (ServerConfig(tls_cert=key, tls_key=key), ServerConfig(tls_cert=cert, tls_key=str(Path(key) / "no"))):
        with pytest.raises(ConfigError, match=r"tls_cert .* cannot be used"):
            tls_context(bad)
