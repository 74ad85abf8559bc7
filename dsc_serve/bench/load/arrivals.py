"""When requests start: the load profiles. A new one is a function here and one line in ARRIVALS."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

# Sends one request and returns when it has ended. Takes the time (time.perf_counter) at which it was due: latencies
# count from there, so that a client that cannot keep up shows in them.
Send = Callable[[float], Coroutine[Any, Any, None]]


class RequestBudget:
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

    concurrency: int  # streams, or how many a burst has
    rate: float = 0.0
    seed: int = 0
    burstiness: float = 1.0  # of gamma arrivals; 1 is Poisson's, less comes in bursts, more at even distances
    end_rate: float = 0.0  # what a ramp's rate has become after `duration_s`
    duration_s: float = 1.0


async def closed_loop(send: Send, budget: RequestBudget, pace: Pace) -> None:
    """`concurrency` streams, each sending its next request as soon as its last has ended."""

    async def stream() -> None:
        while budget.take():
            await send(time.perf_counter())

    async with asyncio.TaskGroup() as streams:
        for _ in range(pace.concurrency):
            streams.create_task(stream())


async def start_at(send: Send, budget: RequestBudget, times: Iterator[float]) -> None:
    """Start a request at each of `times`, seconds from now in rising order, however the others fare."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as requests:
        for seconds in times:
            due = begun + seconds
            await asyncio.sleep(due - time.perf_counter())
            if not budget.take():
                return
            requests.create_task(send(due))


def gamma_times(pace: Pace) -> Iterator[float]:
    """Distances drawn from a gamma distribution with mean 1 / rate and variance 1 / (rate² · burstiness)."""
    draw, at = random.Random(pace.seed), 0.0
    while True:
        at += draw.gammavariate(pace.burstiness, 1 / (pace.rate * pace.burstiness))
        yield at


def ramp_times(pace: Pace) -> Iterator[float]:
    """A Poisson process whose rate r(t) goes evenly from `rate` to `end_rate`, where it stays.

    The expected number of arrivals, Λ(t) = rate·t + slope·t²/2, grows by a draw of mean 1 from each to the next.
    """
    draw, expected = random.Random(pace.seed), 0.0
    slope = (pace.end_rate - pace.rate) / pace.duration_s
    in_ramp = (pace.rate + pace.end_rate) / 2 * pace.duration_s
    while True:
        expected += draw.expovariate(1.0)
        if expected >= in_ramp:
            yield pace.duration_s + (expected - in_ramp) / pace.end_rate
        else:  # the form of the quadratic's root that also holds for a slope of 0
            yield 2 * expected / (pace.rate + math.sqrt(pace.rate**2 + 2 * slope * expected))


def burst_times(pace: Pace) -> Iterator[float]:
    """`concurrency` at once, over and over, at such distances that they come to the rate."""
    for number in itertools.count():
        yield from itertools.repeat(number * pace.concurrency / pace.rate, pace.concurrency)


async def poisson(send: Send, budget: RequestBudget, pace: Pace) -> None:
    """Requests at `rate`, each independent of the others and of how the server fares."""
    await start_at(send, budget, gamma_times(replace(pace, burstiness=1.0)))


async def gamma(send: Send, budget: RequestBudget, pace: Pace) -> None:
    """Requests at `rate`, more or less evenly spread than Poisson's, by `burstiness`."""
    await start_at(send, budget, gamma_times(pace))


async def ramp(send: Send, budget: RequestBudget, pace: Pace) -> None:
    """Requests at a rate that changes evenly."""
    await start_at(send, budget, ramp_times(pace))


async def burst(send: Send, budget: RequestBudget, pace: Pace) -> None:
    """`concurrency` requests at once, again and again at a mean rate."""
    await start_at(send, budget, burst_times(pace))


Arrivals = Callable[[Send, RequestBudget, Pace], Awaitable[None]]
ARRIVALS: dict[str, Arrivals] = {
    "closed": closed_loop,
    "poisson": poisson,
    "gamma": gamma,
    "ramp": ramp,
    "burst": burst,
}
