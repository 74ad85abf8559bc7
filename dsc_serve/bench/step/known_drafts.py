"""Drafts that are right at a given rate: what speculation is worth does not hang on what a text is like."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.drafts import SourceKind
from dsc_serve.engine.drafts.drafting import DraftSource
from dsc_serve.engine.sampler import uniform


class KnownSource(DraftSource):
    """Knows the output, and errs: a draft is right with the chance `rate`, whatever is drafted with it.

    answer: the output, which begins at `start` of the request's tokens. vocabulary: a wrong token is the next one.
    """

    def __init__(self, answer: Sequence[int], start: int, rate: float, vocabulary: int) -> None:
        self._answer, self._start, self._rate, self._vocabulary = answer, start, rate, vocabulary

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        first = len(tokens) - self._start
        known = self._answer[first : first + most]
        return [self._drafted(token, first + i) for i, token in enumerate(known)], 0

    def _drafted(self, token: int, place: int) -> int:
        right = uniform(token, self._start + place) < self._rate
        return token if right else (token + 1) % self._vocabulary


def known_kinds(rate: float, vocabulary: int) -> dict[str, SourceKind]:
    """In the place of all sources: requests bring their outputs as predictions."""
    return {
        "known": SourceKind(
            lambda request: KnownSource(request.params.prediction_token_ids, request.prompt_size, rate, vocabulary),
            (max(rate, 0.01),),
        )
    }
