"""Where the next token of a request is drawn: after all that it knows, or after drafts that may prove right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dsc_serve.engine.drafts.drafting import PREDICTION, DraftTokens
from dsc_serve.engine.output import Delta, TokenLogprobs
from dsc_serve.engine.request import Request
from dsc_serve.engine.token_counts import TokenCounts
from dsc_serve.grammars.constraint import Constraint, ConstraintAhead
from dsc_serve.sampling_params import SamplingParams


class Position(Protocol):
    """What drawing a token goes by; the properties are those of `request.Request`."""

    @property
    def id(self) -> str: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def constraint(self) -> Constraint | ConstraintAhead | None: ...
    @property
    def prompt_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def output_size(self) -> int: ...
    def token_counts(self, start: int) -> TokenCounts: ...


class PositionAhead:
    """A request as it will stand if the first `ahead` of its drafts, at least one, prove right."""

    __slots__ = ("ahead", "constraint", "id", "num_tokens", "output_size", "params", "prompt_size", "request", "seed")

    def __init__(self, request: Request, ahead: int) -> None:
        self.request, self.ahead, self.id = request, ahead, request.id
        self.params, self.seed, self.prompt_size = request.params, request.seed, request.prompt_size
        constraint = request.constraint
        self.constraint = None if constraint is None else ConstraintAhead(constraint, ahead)
        self.num_tokens, self.output_size = request.num_tokens + ahead, request.output_size + ahead

    @property
    def known(self) -> bool:
        """Whether it is known which tokens may follow."""
        return self.constraint is None or self.constraint.ready

    def token_counts(self, start: int) -> TokenCounts:
        """How often each token occurs from this position of the sequence on, with the drafts."""
        return self.request.token_counts(start).followed_by(self.request.drafts[: self.ahead])


@dataclass(slots=True)
class Further:
    """What a step found beyond a request's next token: one token for each draft that proved right."""

    computed: int  # drafts; after some nothing was drawn where a grammar did not say in time what may follow
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of these, where asked for


def agreed(
    first: Mapping[str, int],
    drafted: Mapping[str, int],
    positions: Sequence[PositionAhead],
    tokens: Sequence[int],
    entries: Mapping[int, TokenLogprobs],
) -> dict[str, Further]:
    """What follows the first tokens of requests as long as their drafts are what was drawn in their places.

    first: the tokens drawn before any draft, by request id; drafted: how many drafts of each were computed. positions:
    in their order, those of a request together; tokens: what was drawn there; entries: the log probabilities of some of
    these, by index.
    """
    found = {request_id: Further(count) for request_id, count in drafted.items() if request_id in first}
    for i, (position, token) in enumerate(zip(positions, tokens, strict=True)):
        request, ahead = position.request, position.ahead
        own = found[request.id]
        if len(own.tokens) < ahead - 1:
            continue  # an earlier draft was wrong
        if request.drafts[ahead - 1] == (own.tokens[-1] if own.tokens else first[request.id]):
            own.tokens.append(token)
            if i in entries:
                own.logprobs.append(entries[i])
    return found


def add_further(deltas: Sequence[Delta], further: Mapping[str, Further], drafts: Mapping[str, DraftTokens]) -> None:
    """Let a step's news tell what it found after drafts, and of those from predicted texts how many were right."""
    for delta in deltas:
        found = further.get(delta.request_id)
        if found is None or not delta.token_ids:
            continue
        delta.token_ids += found.tokens
        if delta.logprobs is not None:
            delta.logprobs += found.logprobs
        for (source, _), right, computed in drafts[delta.request_id].shares(len(found.tokens), found.computed):
            if source == PREDICTION:
                delta.prediction = right, computed - right
