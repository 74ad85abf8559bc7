"""Drafts that are right at a given rate: what speculation is worth does not hang on what a text is like."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.drafts import SourceKind
from dsc_serve.engine.drafts.drafting import DraftSource
from dsc_serve.engine.sampler import uniform


class KnownSource(DraftSource):
    """Knows the output, and errs: a draft is right with the chance `rate`, whatever is drafted with it.

    answer: the output, which begins at `start` of the request's tokens. vocabulary: a wrong token is the next one. All
    is drawn beforehand: what the bench's own source takes is no part of what it measures.
    """

    def __init__(self, answer: Sequence[int], start: int, rate: float, vocabulary: int) -> None:
        self._start = start
        self._drafts = [
            token if uniform(token, start + i) < rate else (token + 1) % vocabulary for i, token in enumerate(answer)
        ]

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        first = len(tokens) - self._start
        return self._drafts[first : first + most], 0


def known_kinds(rate: float, vocabulary: int) -> dict[str, SourceKind]:
    """In the place of all sources: requests bring their outputs as predictions."""
    return {
        "known": SourceKind(
            lambda request: KnownSource(request.params.prediction_token_ids, request.prompt_size, rate, vocabulary),
            (max(rate, 0.01),),
        )
    }
