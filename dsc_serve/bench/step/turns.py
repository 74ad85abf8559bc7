"""Runs in one process that take turns, some steps each: whatever the machine does meanwhile, it does to all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import TypeVar

SLICE_S = 0.1  # of a turn, at least: long beside a first step, whose weights others have driven out of the cache

Found = TypeVar("Found")


def in_turns(runs: Sequence[Generator[float, None, Found]], slice_s: float = SLICE_S) -> list[Found]:
    """What the runs return, each of which yields the seconds of every step."""
    found: dict[int, Found] = {}
    waiting = deque(enumerate(runs))
    while waiting:
        place, steps = waiting.popleft()
        spent = 0.0
        try:
            while spent < slice_s:
                spent += next(steps)
        except StopIteration as end:
            found[place] = end.value
        else:
            waiting.append((place, steps))
    return [found[place] for place in range(len(runs))]
