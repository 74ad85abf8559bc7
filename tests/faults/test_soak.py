"""Many short requests, a fifth of them abandoned: memory stays where it was, and nothing is left of any of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from support.running_server import RunningServer, memory_mb, start_server, stop_server

STREAMS = 16
ABORTED = 0.2
WARM_UP = 0.25  # of the requests, after which memory is looked at
SAMPLES = 60
SLOPE_MB = 1.0  # per 1,000 requests
ENOUGH = 3000  # requests, below which a slope is noise


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    server = start_server()
    yield server
    assert stop_server(server) == 0


async def one(port: int, seed: int) -> bool:
    """One request on a connection of its own; whether it was followed to its end."""
    rng = random.Random(seed)
    body = {
        "prompt": " ".join(rng.choice(("the", "a", "king", "river", "when", "of")) for _ in range(rng.randint(1, 60))),
        "max_tokens": rng.randint(1, 12),
        "temperature": rng.choice((0, 0.8)),
        "n": rng.choice((1, 1, 1, 2)),
        "logprobs": rng.choice((None, None, 2)),
        "stop": rng.choice((None, "the")),
        "user": f"user-{seed}",
        "stream": rng.random() < 0.7,
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: soak-{seed}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(60):
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            if rng.random() < ABORTED:
                await reader.read(rng.choice((1, 300, 1000)))
                writer.transport.abort()
                return False
            answer = await reader.read(-1)
            assert answer.startswith(b"HTTP/1.1 200 "), answer[:300]
            return True
    finally:
        writer.close()


async def load(server: RunningServer, count: int, seconds: float) -> tuple[int, int, list[tuple[int, float]]]:
    """Requests until there have been `count` or the time is over: ended, abandoned, and memory (MB) by requests."""
    port, end = int(server.url.rsplit(":", 1)[1]), time.monotonic() + seconds
    seeds, ended, left = iter(range(count)), 0, 0
    samples: list[tuple[int, float]] = []

    async def stream() -> None:
        nonlocal ended, left
        for seed in seeds:
            if time.monotonic() > end:
                return
            if await one(port, seed):
                ended += 1
            else:
                left += 1
            if (ended + left) % max(1, count // SAMPLES) == 0:
                samples.append((ended + left, memory_mb(server.pid) + memory_mb(server.engine_pid)))

    async with asyncio.TaskGroup() as streams:
        for _ in range(STREAMS):
            streams.create_task(stream())
    return ended, left, samples


def slope(samples: list[tuple[int, float]]) -> float:
    """MB per 1,000 requests: the median over all pairs of samples, which no single jump moves."""
    requests, memory = np.array(samples).T
    first, second = np.triu_indices(len(samples), 1)
    return float(np.median((memory[second] - memory[first]) / (requests[second] - requests[first]))) * 1000


def soak(server: RunningServer, count: int, seconds: float) -> None:
    ended, left, samples = asyncio.run(load(server, count, seconds))
    total = ended + left
    warm = [sample for sample in samples if sample[0] >= WARM_UP * total]
    growth = slope(warm)
    print(f"{total} requests, {left} abandoned: {growth:+.3f} MB per 1,000; {warm[0][1]:.0f} to {warm[-1][1]:.0f} MB")
    assert left > 0.1 * total
    if total >= ENOUGH:
        assert growth < SLOPE_MB
    server.wait_until(server.idle, 90)
    assert server.metric('dsc_serve_kv_blocks{state="used"}') == 0
    for gauge in ("permits_held", "requests_followed", "invariant_repairs_total"):
        assert server.metric(f"dsc_serve_{gauge}") == 0


@pytest.mark.parametrize("count", [120, pytest.param(20_000, marks=[pytest.mark.full, pytest.mark.timeout(1500)])])
def test_short_requests_leave_nothing(server: RunningServer, count: int) -> None:
    soak(server, count, 1200)


@pytest.mark.skipif("SOAK_SECONDS" not in os.environ, reason="`make soak` says how many requests and for how long")
@pytest.mark.timeout(7200)
def test_as_many_as_given_leave_nothing(server: RunningServer) -> None:
    soak(server, int(os.environ["SOAK_REQUESTS"]), float(os.environ["SOAK_SECONDS"]))
