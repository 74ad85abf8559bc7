"""A server that speaks just enough HTTP to be measured, and does to each request what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest


class Exchange:
    """One completion request at the fake server, with ways to answer it. `index` counts requests from 0."""

    def __init__(self, writer: asyncio.StreamWriter, index: int, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.writer, self.index, self.headers, self.body = writer, index, headers, body

    async def write(self, data: bytes, piece: int = 0) -> None:
        """Raw bytes; in TCP writes of `piece` bytes if given."""
        for start in range(0, len(data), piece or len(data) or 1):
            self.writer.write(data[start : start + (piece or len(data))])
            await self.writer.drain()
            if piece:
                await asyncio.sleep(0)

    async def begin(self) -> None:
        await self.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes, piece: int = 0) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data), piece)

    async def event(self, value: object, piece: int = 0) -> None:
        await self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n", piece)

    async def token(self, text: str = " word", piece: int = 0, **fields: object) -> None:
        await self.event({"choices": [{"index": 0, "text": text, "finish_reason": None, **fields}]}, piece)

    async def end(self, completion_tokens: int | None = None, piece: int = 0) -> None:
        if completion_tokens is not None:
            usage = {"prompt_tokens": len(self.body["prompt"]), "completion_tokens": completion_tokens}
            await self.event({"choices": [], "usage": usage}, piece)
        await self.chunk(b"data: [DONE]\n\n", piece)
        await self.write(b"0\r\n\r\n", piece)

    async def answer(self, status: str, value: object) -> None:
        body = json.dumps(value).encode()
        await self.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))

    def close(self) -> None:
        self.writer.close()


Script = Callable[[Exchange], Awaitable[None]]


class FakeServer:
    """Runs on a thread of its own, on a free port of 127.0.0.1."""

    def __init__(self, script: Script, models: list[str] | None = None) -> None:
        self.script = script
        self.models = ["fake-model"] if models is None else models
        self.exchanges: list[Exchange] = []
        self.connections = self.hung_up = self.active = self.most_active = 0
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        async def cancel() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=60)
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                await self._exchange(reader, writer)
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if first == "GET /v1/models HTTP/1.1":
            data = [{"id": name} for name in self.models]
            await Exchange(writer, -1, headers, {}).answer("200 OK", {"data": data})
            return
        assert first == "POST /v1/completions HTTP/1.1"
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        exchange = Exchange(writer, len(self.exchanges), headers, body)
        self.exchanges.append(exchange)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            await self.script(exchange)
        except ConnectionError:
            self.hung_up += 1
            raise
        finally:
            self.active -= 1


async def four_tokens(exchange: Exchange) -> None:
    """The script of a server in good health."""
    await exchange.begin()
    for _ in range(4):
        await exchange.token()
    await exchange.end(completion_tokens=4)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Starts a fake server with a script (by default it streams four tokens); it is stopped after the test."""
    servers: list[FakeServer] = []

    def start(script: Script = four_tokens, models: list[str] | None = None) -> FakeServer:
        servers.append(FakeServer(script, models))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
