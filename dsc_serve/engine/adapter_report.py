"""What the engine reports of adapters. Free of torch; travels between processes as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import msgspec

from dsc_serve.engine.histogram import COUNT_EDGES, Histogram

MOST_NAMED = 1024  # adapters that are counted apart
OTHER = "other"  # all further ones, and compositions


class AdapterReport(msgspec.Struct, array_like=True):
    """Now, and since the start. Names are those of the folder's adapters, and `OTHER`."""

    known: int = 0  # in the folder
    loaded: int = 0  # in memory
    nbytes: int = 0
    budget: int = 0
    waiting: int = 0  # requests whose adapter is being loaded, or has no room
    loads: int = 0
    evictions: int = 0
    errors: int = 0
    tokens: dict[str, int] = {}  # computed with each
    requests: dict[str, int] = {}  # that were queued with each
    distinct: Histogram = msgspec.field(default_factory=partial(Histogram, COUNT_EDGES))  # in a step with any
    read_bytes: int = 0  # of the distinct adapters of each step, and of their distinct bases, summed over steps

    def count_request(self, name: str, known: Collection[str]) -> None:
        """One with an adapter has been queued."""
        own = self._label(name, known)
        self.requests[own] = self.requests.get(own, 0) + 1

    def count_step(
        self, tokens: Mapping[str, int], sizes: Collection[int], known: Collection[str], shared: int = 0
    ) -> None:
        """A step with tokens of adapters, by name, the bytes of each distinct one, and of all that they share."""
        self.distinct.observe(len(sizes))
        self.read_bytes += sum(sizes) + shared
        for name, count in tokens.items():
            own = self._label(name, known)
            self.tokens[own] = self.tokens.get(own, 0) + count

    def _label(self, name: str, known: Collection[str]) -> str:
        counted = self.requests.keys() | self.tokens.keys()
        return name if name in counted or (name in known and len(counted) < MOST_NAMED) else OTHER
