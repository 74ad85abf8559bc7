"""Drafts: tokens that may follow a request's, computed with it in one step; one source a file, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsc_serve.engine.drafts.drafting import PREDICTION, DraftSource
from dsc_serve.engine.drafts.grammar import GrammarSource
from dsc_serve.engine.drafts.ngram import NgramSource
from dsc_serve.engine.drafts.prediction import PredictionSource

if TYPE_CHECKING:
    from dsc_serve.engine.request import Request


class Companion(Protocol):
    """Makes drafts for several requests at once. ms: that a draft takes; spent_s: seconds that the last call took."""

    ms: float
    spent_s: float

    def draft(self, asked: Sequence[tuple[Request, int]]) -> None:
        """For each of these requests, at most so many; their sources then have them."""


@dataclass(frozen=True)
class SourceKind:
    """A kind of source."""

    make: Callable[[Request], DraftSource | None]  # the source of a new request; None: it has none
    chances: tuple[float, ...]  # what is expected of its drafts before any was tried, for each strength
    certain: bool = False  # whether they must follow, so that the drafts of others come after them
    together: Companion | None = None  # who makes them before the sources are asked; None: nobody


SOURCES: dict[str, SourceKind] = {
    PREDICTION: SourceKind(
        lambda request: (
            PredictionSource(request.params.prediction_token_ids, request.prompt_size)
            if request.params.prediction_token_ids
            else None
        ),
        (0.5, 0.9),
    ),
    "grammar": SourceKind(
        lambda request: None if request.constraint is None else GrammarSource(request.constraint),
        (0.95,),
        certain=True,
    ),
    "ngram": SourceKind(lambda request: NgramSource(), (0.3, 0.6, 0.8)),
}
