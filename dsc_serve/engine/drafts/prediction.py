"""Drafts from a text that the client expects much of the answer to be like."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.drafts.drafting import DraftSource

WINDOW = 64  # tokens around a difference, among which the place to go on from is looked for
CONTEXT = 8  # tokens that are compared there
SURE = 4  # tokens in agreement from which on drafts are surer


class PredictionSource(DraftSource):
    """Reads on in the predicted tokens as long as the output does; after a difference it looks for where it goes on.

    start: where in the request's tokens the output begins. Until the place is found, one token is taken to stand for
    one other.
    """

    def __init__(self, predicted: Sequence[int], start: int) -> None:
        self._predicted, self._next = predicted, start
        self._place = 0  # of the predicted token that is due
        self._anchor = 0  # where the last difference was, or the place itself
        self._run = 0  # tokens in agreement since

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        for i in range(self._next, len(tokens)):
            self._read(tokens, i)
        self._next = max(self._next, len(tokens))  # a grammar's tokens, which must follow, are read beforehand
        return self._predicted[self._place : self._place + most], int(self._run >= SURE or self._anchor == 0)

    def _read(self, tokens: Sequence[int], at: int) -> None:
        place = self._place
        if place < len(self._predicted) and self._predicted[place] == tokens[at]:
            self._place, self._run = place + 1, self._run + 1
            if self._run >= SURE:
                self._anchor = self._place
            return
        if self._run:
            self._anchor = place
        found = self._realigned(tokens, at)
        self._run = 0
        self._place = place + 1 if found is None else found

    def _realigned(self, tokens: Sequence[int], at: int) -> int | None:
        """After the predicted token that is the output's newest and has the most before it in common, next to the
        difference; None where there is none near it."""
        predicted, best, found = self._predicted, 0, None
        first, end = max(0, self._anchor - WINDOW // 4), min(len(predicted), self._anchor + WINDOW)
        for place in sorted(range(first, end), key=lambda place: abs(place - self._anchor)):
            length = 0
            while length < CONTEXT and length <= min(place, at) and predicted[place - length] == tokens[at - length]:
                length += 1
            if length > best:
                best, found = length, place + 1
        return found
