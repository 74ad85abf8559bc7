"""Steps with drafts as steps of single tokens: each row is a sequence of its own that ends with it.

Keys and values of all rows are written before any row attends, so that a draft sees those before it. A device then
replays what it has captured for so many sequences, and attends to each row as it does without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from dsc_serve.engine.request import Request


class DraftRow:
    """A request as it would be if it had one token to compute, at this position; all else is the request's."""

    def __init__(self, request: Request, position: int) -> None:
        self._request, self.num_computed = request, position
        self.tokens = {position: request.span(position, position + 1)[0]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def single_rows(ordered: Sequence[tuple[Request, int]], most: int) -> Sequence[tuple[Request, int]]:
    """The same step with a row for each draft, where all that is computed beside single tokens are drafts and there are
    at most so many rows; else as it is.
    """
    if sum(count for _, count in ordered) > most or any(n > 1 and one.num_uncomputed != 1 for one, n in ordered):
        return ordered
    rows = [DraftRow(request, request.num_computed + i) for request, count in ordered for i in range(count)]
    return [(cast(Request, row), 1) for row in rows]
