"""How many drafts: as many as make the most of a millisecond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc_serve.engine.draft_time import DraftCost


@dataclass(frozen=True, slots=True)
class Option:
    """The drafts of one request."""

    chances: Sequence[float]  # that each is right where all before it are
    # That it takes longer for each but the first `known`, until a grammar has said what may follow
    mask_ms: float = 0.0
    known: int = 0  # drafts of which that has been said

    @property
    def most(self) -> int:
        return len(self.chances)

    @property
    def chance(self) -> float:
        return self.chances[0]


def widths(options: Sequence[Option], drawn: float, step_ms: float, cost: DraftCost, room: int) -> list[int]:
    """Drafts for each of `options`.

    drawn: tokens that the step draws without any, in `step_ms`. room: drafts that it may hold in all. Who most likely
    has them right comes first; each takes the number with which the step draws the most tokens in a millisecond.
    """
    chosen = [0] * len(options)
    rate = drawn / step_ms
    for i in sorted(range(len(options)), key=lambda i: -options[i].chance):
        option = options[i]
        gain, right, best = 0.0, 1.0, (0.0, 0.0)
        for width, chance in enumerate(option.chances[:room], 1):
            right *= chance
            gain += right
            ms = cost.request + cost.token * width + option.mask_ms * max(0, width - option.known)
            if (drawn + gain) / (step_ms + ms) > rate:
                rate, best, chosen[i] = (drawn + gain) / (step_ms + ms), (gain, ms), width
        drawn, step_ms, room = drawn + best[0], step_ms + best[1], room - chosen[i]
    return chosen
