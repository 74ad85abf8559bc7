"""How many drafts: as many as make the most of a millisecond."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.draft_time import DraftCost


def widths(options: Sequence[tuple[float, int]], drawn: float, step_ms: float, cost: DraftCost, room: int) -> list[int]:
    """Drafts for each of `options` (the chance that one is right where all before it are, and how many there are).

    drawn: tokens that the step draws without any, in `step_ms`. room: drafts that it may hold in all. Who most likely
    has them right comes first; each takes the number with which the step draws the most tokens in a millisecond.
    """
    chosen = [0] * len(options)
    rate = drawn / step_ms
    for i in sorted(range(len(options)), key=lambda i: -options[i][0]):
        chance, most = options[i]
        gain, right, best = 0.0, 1.0, (0.0, 0.0)
        for width in range(1, min(most, room) + 1):
            right *= chance
            gain += right
            ms = cost.request + cost.token * width
            if (drawn + gain) / (step_ms + ms) > rate:
                rate, best, chosen[i] = (drawn + gain) / (step_ms + ms), (gain, ms), width
        drawn, step_ms, room = drawn + best[0], step_ms + best[1], room - chosen[i]
    return chosen
