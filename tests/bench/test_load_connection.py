from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc_serve.bench.load import connection
from dsc_serve.bench.load.connection import Connections, DisconnectError, Endpoint, EventReader, ProtocolError
from dsc_serve.config import ConfigError

STREAM = (
    b': ping\n\ndata: {"a": 1}\n\ndata:x\ndata: y\nid: 7\n\nevent: e\n\n\ndata: \xf0\x9f\x98\x80\n\ndata: unfinished\n'
)
EVENTS = [b'{"a": 1}', b"x\ny", "😀".encode()]


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=20), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int], ends: bytes) -> None:
    stream = STREAM.replace(b"\n", ends)
    reader = EventReader()
    bounds = [0, *sorted(cuts), len(stream)]
    events = [event for start, end in itertools.pairwise(bounds) for event in reader.feed(stream[start:end])]
    assert events == EVENTS


def test_a_line_without_end_is_refused() -> None:
    reader = EventReader()
    with pytest.raises(ProtocolError, match="longer than"):
        for _ in range(20):
            reader.feed(b"x" * 2**20)


def test_requests_carry_what_servers_need() -> None:
    endpoint = Endpoint("http://[::1]:8000/prefix/v1/")
    assert (endpoint.host, endpoint.port, endpoint.tls) == ("::1", 8000, None)
    head, _, body = endpoint.request("POST", "/v1/completions", b"{}", "key").partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /prefix/v1/completions HTTP/1.1"
    assert {b"Host: [::1]:8000", b"Content-Length: 2", b"Authorization: Bearer key"} <= set(head.split(b"\r\n"))
    assert body == b"{}"
    assert Endpoint("https://example.org").port == 443 and Endpoint("https://example.org").tls is not None
    assert Endpoint("http://example.org").port == 80


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "http://host:x", "http://host?a=b", "http://user:pass@host", "", "ws://host"]
)
def test_urls_of_other_forms_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="it must be of the form http://host:port"):
        Endpoint(url)


@pytest.mark.parametrize(
    ("said", "idle_s", "requests"), [(b"", 0.0, 3), (b"", 60.0, 2), (b"HTTP/1.1 200 OK\r\n", 0.0, 2)]
)
def test_a_connection_that_was_closed_while_idle_costs_no_request(
    said: bytes, idle_s: float, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers the first request, and ends the connection at the second: before or within its answer."""
    monkeypatch.setattr(connection, "IDLE_S", idle_s)
    got: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            got.append(len(got))
            if len(got) == 2:
                writer.write(said)
                await writer.drain()
                writer.close()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        body = bytearray()
        with Connections(endpoint) as connections:
            assert await connections.exchange(endpoint.request("GET", "/"), body.extend) == 200
            if requests == 2:
                with pytest.raises(DisconnectError):
                    await connections.exchange(endpoint.request("GET", "/"), body.extend)
            else:
                assert await connections.exchange(endpoint.request("GET", "/"), body.extend) == 200
                assert body == b"okok"
        server.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(got) == requests
