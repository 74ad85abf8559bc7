"""Counts of observations by size, cheap enough for every token. Free of torch; travels between processes as it is."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

import msgspec

# A small model takes milliseconds: the edges begin below it.
STEP_EDGES_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5,
)  # fmt: skip
PHASE_EDGES_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
COUNT_EDGES = tuple(float(2**i) for i in range(16))


class Histogram(msgspec.Struct, array_like=True):
    """How many observations lay between the edges, and their sum."""

    edges: tuple[float, ...]  # rising
    # Of the observations up to each edge and above the one before; the last, of those above all edges
    counts: list[int] = []
    sum: float = 0.0  # of all observations

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.edges) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    @property
    def cumulative(self) -> list[int]:
        """Of the observations up to each edge; the last, of all."""
        return list(accumulate(self.counts))
