"""Connections as nobody should make them: whatever arrives, nothing hangs and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.running_server import RunningServer, memory_mb, start_server, stop_server

AT_A_TIME = 100
HEADER_TIMEOUT_S = 2.0
LIMIT_S = 100.0  # for one connection, on a machine with other work


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    limits = ["--header-timeout-s", str(HEADER_TIMEOUT_S), "--body-timeout-s", "2", "--keep-alive-s", "2"]
    server = start_server(*limits, "--max-requests-per-connection", "0")
    yield server
    assert stop_server(server) == 0


def request(body: bytes, path: str = "/v1/completions", extra: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + extra + b"\r\n" + body


class Visitor:
    """One connection: what it sends, in which pieces and how slowly, and whether it waits for the answer."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.kind = rng.choice(("split", "huge", "utf8", "slow", "early", "garbage", "broken", "pipelined", "silent"))
        fields = {"prompt": "Once upon", "max_tokens": rng.randint(1, 8), "stream": rng.random() < 0.5}
        body = json.dumps(fields).encode()
        self.data = request(body, rng.choice(("/v1/completions", "/v1/completions", "/v1/chat/completions")))
        self.pieces, self.pause_s = 1, 0.0
        self.leaves_after: float | None = None
        getattr(self, self.kind)(body)

    def split(self, body: bytes) -> None:
        self.pieces = self.rng.randint(2, 40)

    def huge(self, body: bytes) -> None:
        size = self.rng.choice((60_000, 70_000, 1_000_000))
        self.data = request(body, extra=b"X-Large: " + b"x" * size + b"\r\n")
        self.pieces = self.rng.randint(1, 10)

    def utf8(self, body: bytes) -> None:
        bad = self.rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x00"))
        place = self.rng.choice((b'{"prompt": "' + bad + b'"}', b'{"' + bad + b'": 1}', bad, bad + body))
        self.data = request(place, extra=b"X-Odd: " + bad.replace(b"\x00", b"\xfe") + b"\r\n")

    def slow(self, body: bytes) -> None:
        self.pieces = self.rng.randint(3, 8)
        self.pause_s = self.rng.choice((0.02, 0.3, 1.0))

    def early(self, body: bytes) -> None:
        self.data = self.data[: self.rng.randint(1, len(self.data))]
        self.leaves_after = self.rng.choice((0.0, 0.01, 0.1))

    def garbage(self, body: bytes) -> None:
        self.data = self.rng.randbytes(self.rng.randint(1, 3000))

    def broken(self, body: bytes) -> None:
        data = bytearray(self.data)
        for _ in range(self.rng.randint(1, 5)):
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        self.data = bytes(data)

    def pipelined(self, body: bytes) -> None:
        self.data *= self.rng.randint(2, 4)

    def silent(self, body: bytes) -> None:
        self.data = self.data[: self.rng.randint(0, 30)]

    async def visit(self, port: int) -> bytes:
        """What the server said, until it closed the connection or this visitor left."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(LIMIT_S):
                reading = asyncio.create_task(self.read(reader))
                cuts = sorted(self.rng.randrange(len(self.data) + 1) for _ in range(self.pieces - 1))
                for start, end in zip([0, *cuts], [*cuts, len(self.data)], strict=True):
                    writer.write(self.data[start:end])
                    with contextlib.suppress(ConnectionError):
                        await writer.drain()
                    await asyncio.sleep(self.pause_s)
                if self.leaves_after is not None:
                    await asyncio.sleep(self.leaves_after)
                    reading.cancel()
                return (await asyncio.gather(reading, return_exceptions=True))[0] or b""
        finally:
            writer.transport.abort()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        said = b""
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(2**16):
                said += part
        return said


def open_files(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_nothing_hangs_and_nothing_is_left(server: RunningServer, count: int) -> None:
    assert server.post("/v1/completions", prompt="Warm", max_tokens=2).status_code == 200
    files, lines = open_files(server), len(server.log)
    port = int(server.url.rsplit(":", 1)[1])
    statuses: Counter[str] = Counter()
    hung: list[str] = []

    async def run() -> None:
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(seed: int) -> None:
            visitor = Visitor(seed)
            async with places:
                try:
                    said = await visitor.visit(port)
                except TimeoutError:
                    hung.append(f"{seed}: {visitor.kind}")
                    return
            answers = said.split(b"HTTP/1.1 ")[1:] if isinstance(said, bytes) else []
            statuses.update(answer[:3].decode("latin-1") for answer in answers)

        await asyncio.gather(*(one(seed) for seed in range(count)))

    start = time.monotonic()
    asyncio.run(run())
    print(f"{count} connections in {time.monotonic() - start:.0f} s: {dict(statuses)}")
    assert not hung, hung[:10]
    assert {"200", "400", "408", "431"} <= set(statuses)
    assert not [status for status in statuses if status.startswith("5")]
    server.wait_until(server.idle, 90)
    server.wait_until(lambda: open_files(server) <= files, 90)
    assert server.metric("dsc_serve_permits_held") == 0
    assert server.metric('dsc_serve_kv_blocks{state="used"}') == 0
    assert server.log[lines:] == []
    assert server.post("/v1/completions", prompt="Next", max_tokens=2).status_code == 200


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=[pytest.mark.full, pytest.mark.timeout(300)])])
@pytest.mark.parametrize("body", [None, b'{"prompt": "Once", "max_tokens": 1}'], ids=["GET /", "completions"])
def test_requests_whose_answers_nobody_reads_take_no_memory(
    server: RunningServer, seconds: float, body: bytes | None
) -> None:
    assert server.post("/v1/completions", prompt="Warm", max_tokens=2).status_code == 200
    idle_mb, files = memory_mb(server.pid), open_files(server)
    port, data = int(server.url.rsplit(":", 1)[1]), (b"GET / HTTP/1.1\r\n\r\n" if body is None else request(body)) * 500
    if body is None:
        data = data.replace(b"\r\n\r\n", b"\r\nHost:\r\n\r\n")
    end, most_mb, answered, connections = time.monotonic() + seconds, 0.0, 0, 0
    while time.monotonic() < end:
        connections += 1
        with socket.create_connection(("127.0.0.1", port)) as client, contextlib.suppress(ConnectionError):
            client.settimeout(0.05)
            while time.monotonic() < end:
                with contextlib.suppress(TimeoutError):
                    client.send(data)
                most_mb = max(most_mb, memory_mb(server.pid))
                if int(time.monotonic() * 2) % 2:  # every other half second somebody else asks
                    start = time.monotonic()
                    assert server.get("/health/live").status_code == 200
                    assert time.monotonic() - start < 5
                    answered += 1
    print(f"idle {idle_mb:.0f} MB, at most {most_mb:.0f} MB over {connections} connections, {answered} others answered")
    assert most_mb < idle_mb + 50
    assert answered > 0
    server.wait_until(lambda: open_files(server) <= files, 90)
    server.wait_until(server.idle, 90)
    assert memory_mb(server.pid) < idle_mb + 50
    assert server.post("/v1/completions", prompt="Next", max_tokens=2).status_code == 200


def test_a_server_ends_in_time_though_a_client_reads_nothing() -> None:
    server = start_server("--drain-s", "1")
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                client.sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 500)
        assert stop_server(server, 30) == 0
    assert not any("Traceback" in line for line in server.log), "".join(server.log)
