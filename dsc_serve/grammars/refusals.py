"""Grammars that took too long or too much of late: the same text is refused at once."""

from __future__ import annotations

import time
from collections import OrderedDict

MOST_REFUSED = 1024  # that are remembered
REFUSED_S = 600.0  # for so long: what was too slow on a busy machine may be asked for again


class Refusals:
    def __init__(self) -> None:
        self._errors: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def add(self, key: bytes, error: str) -> None:
        self._errors[key] = (error, time.monotonic() + REFUSED_S)
        while len(self._errors) > MOST_REFUSED:
            self._errors.popitem(last=False)

    def get(self, key: bytes) -> str:
        """What was wrong with a grammar, or ""."""
        error, until = self._errors.get(key, ("", 0.0))
        if error and time.monotonic() > until:
            del self._errors[key]
            return ""
        return error
