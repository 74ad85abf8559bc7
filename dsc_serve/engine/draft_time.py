"""What drafts add to a step's time, learned from the steps that have some."""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.95  # weight of an observation that is one step with drafts older than another
FADE = 0.96  # and for each estimate of steps without: the machine may have changed
TRUST = 0.5  # observations that what is expected counts for
MASK_MS = 0.3  # that a step is expected to wait for what may follow a draft, before any has


@dataclass(frozen=True)
class DraftCost:
    """Milliseconds that a step takes longer for each request with drafts, and for each draft."""

    request: float
    token: float


class DraftTime:
    """Least squares of what steps took beyond the estimate of the same step without drafts, recent ones first.

    As long as nothing is known, a draft is expected to take as long as another request's token.
    """

    def __init__(self) -> None:
        self._squares = [0.0, 0.0, 0.0]  # of requests, of both, of tokens
        self._products = [0.0, 0.0]
        self._masks, self._masks_ms = 1.0, MASK_MS

    def observe(self, requests: int, tokens: int, ms: float) -> None:
        """So many drafts of so many requests made a step longer by this."""
        squares = requests * requests, requests * tokens, tokens * tokens
        self._squares = [FORGET * old + new for old, new in zip(self._squares, squares, strict=True)]
        self._products = [
            FORGET * old + max(ms, 0.0) * new for old, new in zip(self._products, (requests, tokens), strict=True)
        ]

    def observe_masks(self, masks: int, ms: float) -> None:
        """A step waited so long for a grammar to say what may follow so many drafts."""
        if masks:
            self._masks, self._masks_ms = FORGET * self._masks + masks, FORGET * self._masks_ms + ms

    @property
    def mask_ms(self) -> float:
        """That a step waits for what may follow one draft more: most is computed beside the step."""
        return self._masks_ms / self._masks

    def fade(self) -> None:
        """Steps without drafts have been estimated anew."""
        if self._squares[0] == 0:
            return
        self._squares = [FADE * value for value in self._squares]
        self._products = [FADE * value for value in self._products]

    def cost(self, single: float) -> DraftCost:
        """single: milliseconds of another request's token."""
        rr, rt, tt = self._squares[0] + TRUST, self._squares[1], self._squares[2] + TRUST
        r, t = self._products[0], self._products[1] + TRUST * single
        request = (r * tt - t * rt) / (rr * tt - rt * rt)
        token = (t * rr - r * rt) / (rr * tt - rt * rt)
        if request < 0:
            return DraftCost(0.0, t / tt)
        if token < 0:
            return DraftCost(r / rr, 0.0)
        return DraftCost(request, token)
