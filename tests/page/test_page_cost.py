"""What the live view costs a server: so many tokens of its streams."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.running_server import RunningServer, start_server, stop_server

from dsc_serve.server import page

pytestmark = [pytest.mark.full, pytest.mark.alone, pytest.mark.timeout(900)]

LIVE = Path(page.__file__).parent / "live.js"
STREAMS = 16
WINDOW_S, PAIRS = 8.0, 6
MOST = 0.02  # of the tokens


@pytest.fixture
def server() -> Iterator[RunningServer]:
    running = start_server("--max-running", str(STREAMS))
    yield running
    assert stop_server(running) == 0


def period_s() -> float:
    """Between two looks of the page."""
    (found,) = re.findall(r"PERIOD_MS = (\d+)", LIVE.read_text(encoding="utf-8"))
    return int(found) / 1000


def request(url: str, method: str, path: str, body: object = None) -> bytes:
    sent = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent


async def answered(url: str, sent: bytes) -> bytes:
    """All that comes back."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(sent)
        return await reader.read()
    finally:
        writer.close()


async def stream(url: str, counted: list[int]) -> None:
    """One stream after another; counts its events, which a client as light as this one hardly takes time for."""
    address = urlsplit(url)
    body = {"prompt": "Once upon a time", "max_tokens": 500, "stream": True, "ignore_eos": True, "temperature": 0}
    while True:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(request(url, "POST", "/v1/completions", body))
            while piece := await reader.read(2**16):
                counted[0] += piece.count(b"data: {")
        finally:
            writer.close()


async def look(url: str) -> None:
    """What the page asks for while its live view is open."""
    while True:
        text = await answered(url, request(url, "GET", "/metrics"))
        assert b" 200 " in text.split(b"\r\n", 1)[0] and b"dsc_serve_generated_tokens_total" in text
        await asyncio.sleep(period_s())


async def rates(url: str) -> list[tuple[float, float]]:
    """Tokens a second without a look and with one, pair by pair, each in turn first."""
    counted = [0]
    streams = [asyncio.create_task(stream(url, counted)) for _ in range(STREAMS)]

    async def rate(watched: bool) -> float:
        looking = asyncio.create_task(look(url)) if watched else None
        before, began = counted[0], time.perf_counter()
        await asyncio.sleep(WINDOW_S)
        found = (counted[0] - before) / (time.perf_counter() - began)
        if looking is not None:
            assert not looking.done(), looking.exception()
            looking.cancel()
        return found

    try:
        await rate(False)
        pairs = []
        for i in range(PAIRS):
            both = {watched: await rate(watched) for watched in ((False, True) if i % 2 else (True, False))}
            pairs.append((both[False], both[True]))
        return pairs
    finally:
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


def test_the_live_view_takes_less_than_2_percent_of_the_tokens_of_16_streams(server: RunningServer) -> None:
    pairs = asyncio.run(rates(server.url))
    costs = [1 - watched / alone for alone, watched in pairs]
    cost = statistics.median(costs)
    print(
        f"{statistics.median(alone for alone, _ in pairs):.0f} tokens/s alone; the live view takes {100 * cost:.2f} %"
    )
    print("by pair: " + ", ".join(f"{100 * one:.2f} %" for one in costs))
    assert cost < MOST
