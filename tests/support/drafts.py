"""Drafts of which it is known how often they are right, in widths that nobody chose."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import msgspec

from dsc_serve.bench.step.known_drafts import known_kinds
from dsc_serve.engine.draft_time import DraftCost, DraftTime
from dsc_serve.engine.drafts import SourceKind
from dsc_serve.engine.drafts.drafter import Choose, Drafter
from dsc_serve.engine.drafts.drafting import DraftSource
from dsc_serve.engine.drafts.widths import Option
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.step_time import Estimate
from support.fake_runner import VOCABULARY, hashed_logits


def any_width(seed: int) -> Choose:
    """Widths by chance, whatever they cost."""
    rng = random.Random(seed)

    def choose(options: Sequence[Option], drawn: float, step_ms: float, cost: DraftCost, room: int) -> list[int]:
        widths = []
        for option in options:
            widths.append(rng.randint(0, min(option.most, room - sum(widths))))
        return widths

    return choose


class GreedySource(DraftSource):
    """The greedy continuation of the fake runner's, wrong now and then."""

    def __init__(self, rate: float, seed: int) -> None:
        self._rate, self._rng = rate, random.Random(seed)

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        drafted = list(tokens)
        for _ in range(most):
            right = int(hashed_logits(drafted).argmax())
            drafted.append(right if self._rng.random() < self._rate else (right + 1) % VOCABULARY)
        return drafted[len(tokens) :], 0


def guess(engine: Engine, most: int, rate: float, seed: int, known: bool = False) -> None:
    """Let an engine draft, whatever it costs: greedy continuations, or with `known` what requests predict."""
    greedy = {"greedy": SourceKind(lambda request: GreedySource(rate, seed), (0.5,))}
    draft_from(engine, most, known_kinds(rate, VOCABULARY) if known else greedy, any_width(seed))


def all_there_are(options: Sequence[Option], drawn: float, step_ms: float, cost: DraftCost, room: int) -> list[int]:
    return [min(option.most, room // len(options)) for option in options]


def draft_from(engine: Engine, most: int, kinds: Mapping[str, SourceKind], choose: Choose = all_there_are) -> None:
    """Let an engine draft from sources, whatever it costs."""
    engine.drafter = Drafter(most, engine.config.step_tokens, engine._eos, kinds, choose)
    engine.capacity = msgspec.structs.replace(engine.capacity, max_drafts=most)
    times = engine.scheduler.step_time
    times.estimate = times.estimate or Estimate(step=1.0)
    times.drafts = FreeDrafts()


class FreeDrafts(DraftTime):
    def cost(self, single: float) -> DraftCost:
        return DraftCost(0.0, 0.0)
