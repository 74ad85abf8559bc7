"""How evenly a layer's atoms are used, as of late: what was long ago would hide that traffic has changed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PICKS_PER_ATOM = 256  # of a window, on average
HOTTEST = 0.01  # of the atoms


class AtomUsage:
    """Follows counts int64 [layers, atoms] of picks, k per token, that somebody else adds up.

    What it tells is of the last one to two windows, or of everything where that is less.
    """

    def __init__(self, counts: NDArray[np.int64], k: int) -> None:
        self._counts, self._k = counts, k
        self.window = max(1, PICKS_PER_ATOM * counts.shape[1] // k)
        self._before, self._last = np.zeros_like(counts), np.zeros_like(counts)
        self._starts, self._tokens = (0, 0), 0  # in tokens, of the two windows

    def advance(self, tokens: int) -> None:
        """The counts are now those of so many tokens."""
        self._tokens = tokens
        if tokens - self._starts[1] >= self.window:
            self._before, self._last = self._last, self._counts.copy()
            self._starts = self._starts[1], tokens

    @property
    def picks_per_atom(self) -> float:
        """How many picks of an atom the shares are of, on average."""
        return (self._tokens - self._starts[0]) * self._k / len(self._counts[0])

    def shares(self, layer: int) -> tuple[float, float, float]:
        """Of the atoms, those never picked; of the picks, those of the hottest 1 % of atoms; the picks' entropy,
        relative to that of uniform ones."""
        counts = self._counts[layer] - self._before[layer]
        total, hottest = int(counts.sum()), max(1, round(HOTTEST * len(counts)))
        if total == 0:
            return 1.0, 0.0, 0.0
        used = counts[counts > 0] / total
        top = float(np.partition(counts, -hottest)[-hottest:].sum()) / total
        entropy = float(-(used * np.log(used)).sum() / np.log(len(counts))) if len(counts) > 1 else 1.0
        return 1 - len(used) / len(counts), top, entropy
