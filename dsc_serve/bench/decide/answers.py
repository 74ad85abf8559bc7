"""What a law expects of a model that serves: tokens per second, times, and what speculation is worth."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dsc_serve.bench.decide.cost_law import CostLaw
from dsc_serve.bench.decide.sizes import ModelFrame
from dsc_serve.bench.decide.step_terms import StepShape

ACCEPTANCE = 0.7  # of drafts, where nobody says another share
MOST_DRAFTS = 7  # for each stream, as in serve


class ClosedLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop: streams of requests with prompts and answers of so many tokens."""

    streams: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 48
    output_tokens: int = 64
    acceptance: float = ACCEPTANCE  # the chance that a draft is right whose forerunners were

    @property
    def context(self) -> float:
        """Tokens before one that is generated, on average."""
        return self.prompt_tokens + self.output_tokens / 2


class ExpectedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A system at a number of streams; milliseconds."""

    system: str
    weights: str
    streams: int
    speculation: bool
    tokens_per_s: float
    token: float  # between tokens, drafts that are right counted as tokens
    # to the first token of a prompt that comes alone and is computed in one step beside the other streams' tokens
    first: float
    end: float  # of a whole request
    drafts: int  # for each stream and step, as many as make a token cheapest; 0: none


def tokens_a_step(acceptance: float, drafts: int) -> float:
    """Expected tokens of one stream in a step with so many drafts: 1 + a + … + aⁿ."""
    return sum(acceptance**i for i in range(drafts + 1))


def expect(
    law: CostLaw, system: str, weights: str, frame: ModelFrame, load: ClosedLoad, streams: int, speculation: bool
) -> ExpectedFigures:
    """Each stream's prompt delays every other stream's tokens once in the time of a request."""

    def ms(**shape: int) -> float:
        return law.ms(system, frame, StepShape(context=load.context, **shape))

    widths = range(MOST_DRAFTS + 1 if speculation else 1)
    token, drafts = min((ms(singles=streams, drafts=n) / tokens_a_step(load.acceptance, n), n) for n in widths)
    quiet = ms(singles=streams - 1) if streams > 1 else 0.0
    first = ms(singles=streams - 1, chunk=load.prompt_tokens)
    end = first + (load.output_tokens - 1) * token + (streams - 1) * (first - quiet)
    return ExpectedFigures(
        system=system,
        weights=weights,
        streams=streams,
        speculation=speculation,
        tokens_per_s=1e3 * streams * load.output_tokens / end,
        token=token,
        first=first,
        end=end,
        drafts=drafts,
    )


def expect_all(laws: dict[str, CostLaw], frame: ModelFrame, load: ClosedLoad) -> list[ExpectedFigures]:
    """Of every system and form of weights that a law is of, at all streams, without and with speculation."""
    return [
        expect(law, system, weights, frame, load, streams, speculation)
        for weights, law in laws.items()
        for system in law.forms
        for speculation in (False, True)
        for streams in load.streams
    ]


def best(figures: Sequence[ExpectedFigures], streams: int) -> ExpectedFigures:
    """The most tokens per second at a number of streams."""
    return max((one for one in figures if one.streams == streams), key=lambda one: one.tokens_per_s)
