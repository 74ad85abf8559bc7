"""How often each token of a sequence occurs, kept as the sequence grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Tally:
    """Follows a sequence of tokens from `start` on; each is looked at once, however often the tally is asked."""

    def __init__(self, start: int) -> None:
        self._next = start
        self._places: dict[int, int] = {}
        self._table = np.zeros((2, 64), dtype=np.int64)

    def follow(self, tokens: Sequence[int]) -> Tally:
        """Take in what is new at the end of the sequence."""
        new = tokens[self._next :]
        self._next += len(new)
        for token in new:
            place = self._places.setdefault(token, len(self._places))
            if place == self._table.shape[1]:
                self._table = np.hstack((self._table, np.zeros_like(self._table)))
            self._table[0, place] = token
            self._table[1, place] += 1
        return self

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The different tokens, in order of their first occurrence; a view until the next `follow`."""
        return self._table[0, : len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each of `tokens` occurs."""
        return self._table[1, : len(self._places)]
