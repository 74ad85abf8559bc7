"""When requests start: the load profiles. A new one is a function here and one line in ARRIVALS."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

# Sends one request and returns when it has ended. Takes the time (time.perf_counter) at which it was due: latencies
# count from there, so that a client that cannot keep up shows in them.
Send = Callable[[float], Coroutine[Any, Any, None]]


class Budget:
    """How many requests may still start, and until when (seconds from now)."""

    def __init__(self, requests: int, duration_s: float) -> None:
        self._left = requests
        self._deadline = time.perf_counter() + duration_s

    def take(self) -> bool:
        """Whether one more request may start; counts it."""
        if self._left <= 0 or time.perf_counter() >= self._deadline:
            return False
        self._left -= 1
        return True


@dataclass(frozen=True)
class Pace:
    """How fast requests start: streams of a closed loop, requests per second of an open one, drawn from the seed."""

    concurrency: int
    rate: float = 0.0
    seed: int = 0


async def closed_loop(send: Send, budget: Budget, pace: Pace) -> None:
    """`concurrency` streams, each sending its next request as soon as its last has ended."""

    async def stream() -> None:
        while budget.take():
            await send(time.perf_counter())

    async with asyncio.TaskGroup() as streams:
        for _ in range(pace.concurrency):
            streams.create_task(stream())


async def poisson(send: Send, budget: Budget, pace: Pace) -> None:
    """Requests at `rate`, each independent of the others and of how the server fares."""
    draw, due = random.Random(pace.seed), time.perf_counter()
    async with asyncio.TaskGroup() as requests:
        while True:
            due += draw.expovariate(pace.rate)
            await asyncio.sleep(due - time.perf_counter())
            if not budget.take():
                return
            requests.create_task(send(due))


Arrivals = Callable[[Send, Budget, Pace], Awaitable[None]]
ARRIVALS: dict[str, Arrivals] = {"closed": closed_loop, "poisson": poisson}
