"""Drafts: tokens that may follow a request's, computed with it in one step; one source a file, registered by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsc_serve.engine.drafts.drafting import PREDICTION, DraftSource
from dsc_serve.engine.drafts.ngram import NgramSource
from dsc_serve.engine.drafts.prediction import PredictionSource
from dsc_serve.sampling_params import SamplingParams


@dataclass(frozen=True)
class SourceKind:
    """A kind of source. make: the source of a request whose output begins at this position; None: it has none.

    chances: what is expected of its drafts before any was tried, for each strength.
    """

    make: Callable[[SamplingParams, int], DraftSource | None]
    chances: tuple[float, ...]


SOURCES: dict[str, SourceKind] = {
    PREDICTION: SourceKind(
        lambda params, start: (
            PredictionSource(params.prediction_token_ids, start) if params.prediction_token_ids else None
        ),
        (0.5, 0.9),
    ),
    "ngram": SourceKind(lambda params, start: NgramSource(), (0.3, 0.6, 0.8)),
}
