"""How long a step takes, learned from the steps themselves."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from dsc_serve.engine.draft_time import DraftTime

FORGET = 0.98  # weight of an observation that is one step older than another
OUTLIER = 4.0  # a step that took this many times its estimate counts as one that took so many times
TRUST = 16  # observations before outliers are told from steps
FIT_EVERY = 8  # steps without a chunk
LATEST = 5  # steps of single tokens alone that say how far the estimate is off just now
SWEEPS = 6
SHORTEST_MS = 0.01
FORGOTTEN = 1e-200  # weight of observations, below which products of them underflow


@dataclass(slots=True)
class Load:
    """What one step computes: single tokens, tokens of chunks, and the pairs that these attend.

    A chunk of n tokens after c computed ones attends n · c + n² / 2 pairs.
    """

    singles: int = 0  # requests with one token
    tokens: int = 0  # of chunks
    pairs: float = 0.0  # of a chunk's token and one that it attends
    drafted: int = 0  # of the requests with one token, those with drafts
    drafts: int = 0
    masks: int = 0  # of the drafts, those after which a grammar has to say what may follow

    def add(self, count: int, num_computed: int, times: int = 1) -> None:
        """Add (or, with −1 times, take away) a request's share of the step."""
        if count == 1:
            self.singles += times
        else:
            self.tokens += times * count
            self.pairs += times * chunk_pairs(count, num_computed)


def chunk_pairs(count: int, num_computed: int) -> float:
    return count * (num_computed + count / 2)


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of a step, and of each unit of its load."""

    step: float
    single: float = 0.0
    token: float = 0.0
    pair: float = 0.0

    def quiet_ms(self, load: Load) -> float:
        """A step with the single tokens of a load and no chunk."""
        return self.step + self.single * load.singles

    def ms(self, load: Load) -> float:
        """A step with a load, but without its drafts."""
        return self.quiet_ms(load) + self.token * load.tokens + self.pair * load.pairs

    def chunk_ms(self, count: int, num_computed: int) -> float:
        return self.token * count + self.pair * chunk_pairs(count, num_computed)

    def chunk_within(self, ms: float, num_computed: int) -> float:
        """Most tokens of a chunk, after so many computed ones, that take at most so long."""
        linear, square = self.token + self.pair * num_computed, self.pair / 2
        if ms <= 0:
            return 0.0
        if square == 0:
            return ms / linear if linear else math.inf
        return (math.sqrt(linear * linear + 4 * square * ms) - linear) / (2 * square)


class StepTime:
    """Fits `Estimate` to observed steps: least squares of relative errors, recent steps first, no cost below zero.

    A cost that recent steps say nothing about keeps its value. How long the contexts of single tokens are is left out:
    they grow slowly, so that the last steps tell.
    """

    def __init__(self) -> None:
        self.estimate: Estimate | None = None
        self.drafts = DraftTime()
        self._costs = [0.0] * 4
        self._squares = [[0.0] * 4 for _ in range(4)]
        self._products = [0.0] * 4
        self._seen = 0
        self._off = deque[float](maxlen=LATEST)  # what the latest steps took, to what had been expected of them

    def without_drafts(self, load: Load) -> float | None:
        """Milliseconds of a step with a load but without its drafts. The latest such steps correct the estimate: while
        most steps have drafts they are too few to fit.
        """
        if self.estimate is None:
            return None
        return max(self.estimate.ms(load) * (statistics.median(self._off) if self._off else 1.0), SHORTEST_MS)

    def observe(self, load: Load, ms: float) -> None:
        """Learn from a step that took so long; from one with drafts, what these take."""
        if load.drafts:
            expected = self.without_drafts(load) or ms
            self.drafts.observe(load.drafted, load.drafts, min(ms, OUTLIER * expected) - expected)
            return
        if self.estimate is not None and not load.tokens:
            self._off.append(min(ms / max(self.estimate.ms(load), SHORTEST_MS), OUTLIER))
        units = (1.0, load.singles, load.tokens, load.pairs)
        if self._seen >= TRUST:
            expected = sum(cost * unit for cost, unit in zip(self._costs, units, strict=True))
            ms = min(ms, OUTLIER * max(expected, SHORTEST_MS))
        ms = max(ms, SHORTEST_MS)
        row = [unit / ms for unit in units]
        self._squares = [
            [FORGET * square + a * b for square, b in zip(line, row, strict=True)]
            for line, a in zip(self._squares, row, strict=True)
        ]
        self._products = [FORGET * product + a for product, a in zip(self._products, row, strict=True)]
        self._seen += 1
        if load.tokens or self._seen % FIT_EVERY == 0 or self.estimate is None:
            self._fit()

    def _fit(self) -> None:
        """Coordinate descent from the last costs."""
        costs, products = self._costs, self._products
        for _ in range(SWEEPS):
            for i, line in enumerate(self._squares):
                if line[i] > FORGOTTEN:
                    error = products[i] - sum(a * c for a, c in zip(line, costs, strict=True))
                    costs[i] = max(0.0, costs[i] + error / line[i])
        self.estimate = Estimate(*costs)
        self.drafts.fade()
