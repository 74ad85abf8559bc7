"""What the engine reports of drafts. Free of torch; travels between processes as it is."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Self

import msgspec

from dsc_serve.engine.histogram import COUNT_EDGES, Histogram


class DraftReport(msgspec.Struct, array_like=True):
    """All drafts since the start, by source."""

    drafted: dict[str, int] = {}  # tokens that were computed
    accepted: dict[str, int] = {}  # of these, which proved right
    width: Histogram = msgspec.field(default_factory=partial(Histogram, COUNT_EDGES))  # drafts of a request in a step

    @classmethod
    def of(cls, sources: Iterable[str]) -> Self:
        """Of sources that have not drafted yet."""
        return cls(dict.fromkeys(sources, 0), dict.fromkeys(sources, 0))

    def count(self, source: str, right: int, computed: int) -> None:
        self.drafted[source] += computed
        self.accepted[source] += right
