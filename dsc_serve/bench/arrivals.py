"""When requests start: the load profiles. A new one is a function here and one line in ARRIVALS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

# Sends one request and returns when it has ended. Takes the time (time.perf_counter) at which it was due: latencies
# count from there, so that a client that cannot keep up shows in them.
Send = Callable[[float], Awaitable[None]]


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


async def closed_loop(send: Send, budget: Budget, concurrency: int) -> None:
    """`concurrency` streams, each sending its next request as soon as its last has ended."""

    async def stream() -> None:
        while budget.take():
            await send(time.perf_counter())

    async with asyncio.TaskGroup() as streams:
        for _ in range(concurrency):
            streams.create_task(stream())


Arrivals = Callable[[Send, Budget, int], Awaitable[None]]
ARRIVALS: dict[str, Arrivals] = {"closed": closed_loop}
