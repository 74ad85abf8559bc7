"""How often each token of a sequence occurs, kept as the sequence grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Follows a sequence of tokens from `start` on; each is looked at once, however often the tally is asked."""

    def __init__(self, start: int) -> None:
        self._next = start
        self._columns: dict[int, int] = {}
        self._table = np.zeros((2, 64), dtype=np.int64)

    def follow(self, tokens: Sequence[int]) -> TokenCounts:
        """Take in what is new at the end of the sequence."""
        new = tokens[self._next :]
        self._next += len(new)
        for token in new:
            column = self._columns.setdefault(token, len(self._columns))
            if column == self._table.shape[1]:
                self._table = np.hstack((self._table, np.zeros_like(self._table)))
            self._table[0, column] = token
            self._table[1, column] += 1
        return self

    def followed_by(self, tokens: Sequence[int]) -> TokenCounts:
        """A copy that has taken in these as well."""
        copy = TokenCounts(0)
        copy._columns, copy._table = self._columns.copy(), self._table.copy()
        return copy.follow(tokens)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The different tokens, in order of their first occurrence; a view until the next `follow`."""
        return self._table[0, : len(self._columns)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each of `tokens` occurs."""
        return self._table[1, : len(self._columns)]
