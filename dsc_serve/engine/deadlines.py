"""Which requests have run out of time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from dsc_serve.engine.request import Request

SLACK = 64


class Deadlines:
    """The limits of requests in the engine, earliest first. Those of ended requests are dropped in passing."""

    def __init__(self, is_live: Callable[[Request], bool]) -> None:
        self._is_live = is_live
        self._heap: list[tuple[float, int, Request, str]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        for field in ("queue_timeout_s", "timeout_s"):
            seconds = getattr(request.scheduling, field)
            if seconds is not None:
                heapq.heappush(self._heap, (request.arrived + seconds, next(self._numbers), request, field))

    def due(self, now: float) -> list[tuple[Request, str]]:
        """The live requests that are out of time, each with the field of its scheduling that says so."""
        found: dict[str, tuple[Request, str]] = {}
        while self._heap and self._heap[0][0] <= now:
            _, _, request, field = heapq.heappop(self._heap)
            began = field == "queue_timeout_s" and request.has_begun
            if self._is_live(request) and not began:
                found.setdefault(request.id, (request, field))
        return list(found.values())

    def prune(self, live: int) -> None:
        """Forget ended requests where they outnumber the live ones, whose limits are at most two each."""
        if len(self._heap) > 4 * live + (SLACK if live else 0):
            self._heap = [entry for entry in self._heap if self._is_live(entry[2])]
            heapq.heapify(self._heap)
