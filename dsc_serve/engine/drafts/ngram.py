"""Drafts from a request's own tokens: what followed where they last ended as they end now."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.drafts.drafting import DraftSource

REACH = 2**14  # latest tokens that are looked through
CATCH_UP = 256  # tokens that one call takes in
TRIES = 8  # earlier places that are compared
LONGEST = 16  # tokens that are compared
SURE = (4, 8)  # tokens in agreement from which on drafts are surer


class NgramSource(DraftSource):
    """Follows the longest earlier occurrence of the last tokens, of at least two; of equals the latest.

    Each pair of tokens is chained to its last occurrence: taking in a token takes a microsecond or so.
    """

    def __init__(self) -> None:
        self._next = 1
        self._last: dict[tuple[int, int], int] = {}
        self._before = [-1] * 64  # by position modulo its size: where the same pair stood before

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        end = len(tokens)
        self._follow(tokens)
        if self._next < end:
            return (), 0
        length, place = self._longest(tokens)
        if length == 0:
            return (), 0
        period = end - 1 - place
        found = list(tokens[place + 1 : place + 1 + most])
        while len(found) < most:  # what repeats itself goes on repeating itself
            found.append(found[-period])
        return found, sum(length >= sure for sure in SURE)

    def _follow(self, tokens: Sequence[int]) -> None:
        last, end = self._last, min(len(tokens), self._next + CATCH_UP)
        if len(tokens) - self._next > REACH:
            self._next = len(tokens) - REACH
            end = self._next + CATCH_UP
        while len(self._before) < min(end, REACH):
            self._before += [-1] * len(self._before)
        before, size = self._before, len(self._before)
        for i in range(self._next, end):
            pair = tokens[i - 1], tokens[i]
            if i > REACH:
                gone = tokens[i - REACH - 1], tokens[i - REACH]
                if last.get(gone) == i - REACH:
                    del last[gone]
            before[i % size] = last.get(pair, -1)
            last[pair] = i
        self._next = max(self._next, end)

    def _longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many tokens agree at the best earlier place, and that place; 0 where there is none."""
        at = len(tokens) - 1
        oldest, size = max(0, at - REACH), len(self._before)
        best, best_place = 0, -1
        place = self._before[at % size] if at > 0 else -1
        for _ in range(TRIES):
            if place <= oldest:
                break
            length = 2
            while length < LONGEST and length <= place and tokens[place - length] == tokens[at - length]:
                length += 1
            if length > best:
                best, best_place = length, place
                if length == LONGEST:
                    break
            place = self._before[place % size]
        return best, best_place
