"""The heads of requests: what RFC 9112 makes a fault is one, in HTTP/1.1 and in HTTP/1.0."""

from __future__ import annotations

import asyncio

import pytest
from support.fake_engine import FakeEngine
from support.serving import app_around, post_bytes
from test_connections import said

FIELDS = {"prompt": [1], "max_tokens": 3}
BODY = post_bytes("/v1/completions", FIELDS).partition(b"\r\n\r\n")[2]
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
JSON = b"Content-Type: application/json\r\n"


def post(version: bytes, headers: bytes, body: bytes = BODY) -> bytes:
    framing = b"" if b"Transfer-Encoding" in headers else b"Content-Length: %d\r\n" % len(body)
    return b"POST /v1/completions HTTP/%b\r\n%b%b%b\r\n%b" % (version, JSON, framing, headers, body)


def status_of(engine: FakeEngine, request: bytes) -> int:
    answer = asyncio.run(said(app_around(engine, None, keep_alive_s=1), request))
    assert b'"error":{"message"' in answer or answer.startswith(b"HTTP/1.1 200 ")
    return int(answer.split()[1])


@pytest.mark.parametrize(
    ("version", "headers", "status"),
    [
        (b"1.1", b"Host: x\r\n", 200),
        (b"1.1", b"hOST: [::1]:8000\r\n", 200),
        (b"1.1", b"Host: a.b-c.example:80\r\n", 200),
        (b"1.1", b"Host:\r\n", 200),
        (b"1.0", b"", 200),
        (b"1.0", b"Host: x\r\n", 200),
        (b"1.1", b"", 400),
        (b"1.1", b"Host: x\r\nHost: x\r\n", 400),
        (b"1.1", b"Host: x\r\nA: b\r\nhost: y\r\n", 400),
        (b"1.0", b"Host: x\r\nHost: y\r\n", 400),
        (b"1.1", b"Host: x y\r\n", 400),
        (b"1.1", b"Host: x, y\r\n", 400),
        (b"1.1", b"Host: http://x/\r\n", 400),
        (b"1.1", b"Host: me@x\r\n", 400),
        (b"1.1", b"Host: x:80:80\r\n", 400),
        (b"1.1", b"Host: \xff\r\n", 400),
    ],
)
def test_there_is_one_host(engine: FakeEngine, version: bytes, headers: bytes, status: int) -> None:
    assert status_of(engine, post(version, headers)) == status
    assert len(engine.submitted) == (status == 200)


@pytest.mark.parametrize(
    ("version", "coding", "status"),
    [
        (b"1.1", b"chunked", 200),
        (b"1.1", b" Chunked ", 200),
        (b"1.1", b"gzip, chunked", 501),
        (b"1.1", b"deflate,chunked", 501),
        (b"1.1", b"chunked;a=b", 501),
        (b"1.1", b"identity", 501),
        (b"1.1", b"xchunked", 501),
        (b"1.1", b"chunked, gzip", 400),
        (b"1.1", b"chunked\r\nTransfer-Encoding: chunked", 400),
        (b"1.1", b"gzip\r\nTransfer-Encoding: chunked", 501),
        (b"1.1", b"chunked\r\nTransfer-Encoding: identity", 400),
        (b"1.1", b"", 400),
        (b"1.0", b"chunked", 400),
    ],
)
def test_bodies_come_in_chunks_or_with_a_length_and_in_no_other_coding(
    engine: FakeEngine, version: bytes, coding: bytes, status: int
) -> None:
    request = post(version, b"Host: x\r\nTransfer-Encoding: %b\r\n" % coding, CHUNKED)
    assert status_of(engine, request) == status
    assert len(engine.submitted) == (status == 200)


def test_the_codings_that_a_client_would_take_are_no_codings_of_its_body(engine: FakeEngine) -> None:
    assert status_of(engine, post(b"1.1", b"Host: x\r\nTE: trailers, deflate;q=0.5\r\nConnection: TE\r\n")) == 200


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
def test_other_versions_are_refused(engine: FakeEngine, version: bytes) -> None:
    assert status_of(engine, post(version, b"Host: x\r\n")) == 400


@pytest.mark.parametrize(("count", "status"), [(200, 200), (300, 431), (5000, 431)])
def test_a_head_has_so_many_headers_at_the_most(engine: FakeEngine, count: int, status: int) -> None:
    headers = b"Host: x\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(count))
    assert status_of(engine, post(b"1.1", headers)) == status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [b"", b"Connection: keep-alive\r\nHost: x\r\n", b"Expect: 100-continue\r\n"])
def test_an_answer_to_http_1_0_ends_with_the_connection_and_has_no_chunks(
    engine: FakeEngine, stream: bool, extra: bytes
) -> None:
    body = post_bytes("/v1/completions", {**FIELDS, "stream": stream}).partition(b"\r\n\r\n")[2]
    answer = asyncio.run(said(app_around(engine, None, keep_alive_s=20), post(b"1.0", extra, body)))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    if stream:
        assert b"content-length" not in head.lower()
        assert rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
        assert all(line.startswith(b"data: ") for line in rest.split(b"\n\n")[:-1])
    else:
        assert rest.startswith(b'{"id":') and rest.endswith(b"}")


def test_the_head_of_a_stream_can_be_asked_for_in_http_1_0(engine: FakeEngine) -> None:
    answer = asyncio.run(said(app_around(engine, None), b"HEAD /metrics HTTP/1.0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n")
