"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=256)  # the choices of a request look for the same
def failure_table(stop: str) -> Sequence[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix.

    The table of Knuth, Morris and Pratt.
    """
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        length += stop[i] == stop[length]
        table[i] = length
    return table


class StopMatcher:
    """Releases text up to the first stop string, holding back only what could still begin one.

    The first is the one that completes first, and the longest of those that complete together; so the result does not
    depend on how the text was cut. Work is linear in the text, whatever the stops.
    found: the stop string once one appeared, else None; from then on nothing is released.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first: of two that complete together the first match wins.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._tables = [failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.found: str | None = None

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def push(self, text: str) -> str:
        """The text that can be released now."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        if not self._held and self._first.isdisjoint(text):
            return text
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            for i, stop in enumerate(self._stops):
                length, table = self._matched[i], self._tables[i]
                while length and char != stop[length]:
                    length = table[length - 1]
                length += char == stop[length]
                if length == len(stop):
                    self.found = stop
                    self._held = ""
                    return pending[: end - length]
                self._matched[i] = length
        keep = len(pending) - max(self._matched)
        self._held = pending[keep:]
        return pending[:keep]

    def flush(self) -> str:
        """What is held back, at the end: it did not become a stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held
