"""Runs in one process that take turns, some steps each: whatever the machine does meanwhile, it does to all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import TypeVar

SLICE_S = 0.1  # of a turn, at least
SLICE_STEPS = 8  # likewise, so that most are counted

Found = TypeVar("Found")


def in_turns(
    runs: Sequence[Generator[float, bool | None, Found]], slice_s: float = SLICE_S, slice_steps: int = SLICE_STEPS
) -> list[Found]:
    """What the runs return, each of which yields the seconds of every step.

    A run is sent whether its next step begins a turn after somebody else's: its weights are out of the cache then, as
    those of a server of its own are not, and it leaves that step out.
    """
    found: dict[int, Found] = {}
    waiting, begun, last = deque(enumerate(runs)), set[int](), None
    while waiting:
        place, steps = waiting.popleft()
        spent, taken = 0.0, 0
        try:
            while spent < slice_s or taken < slice_steps:
                spent += steps.send(last != place) if place in begun else next(steps)
                begun.add(place)
                last = place
                taken += 1
        except StopIteration as end:
            found[place] = end.value
        else:
            waiting.append((place, steps))
    return [found[place] for place in range(len(runs))]
