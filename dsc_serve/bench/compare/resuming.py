"""What of a comparison was measured before, what of it is still missing, and for how long it is measured now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

import msgspec

from dsc_serve.bench.compare.comparison import ComparedSystem, Comparison, ComparisonError
from dsc_serve.bench.compare.results import Results


class OutOfTimeError(Exception):
    """The minutes that a part of a comparison has are over."""


class Deadline:
    """Once so many minutes have passed nothing new is begun; 0: never."""

    def __init__(self, minutes: float = 0.0) -> None:
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end

    def check(self) -> None:
        """Raises OutOfTimeError."""
        if self.over:
            raise OutOfTimeError


def loads(comparison: Comparison) -> list[tuple[Literal["closed", "open"], float]]:
    """Those of a round, in order."""
    points: list[tuple[Literal["closed", "open"], float]] = [("closed", streams) for streams in comparison.streams]
    return [*points, *(("open", rate) for rate in comparison.rates)]


def missing(comparison: Comparison, results: Results, system: ComparedSystem, number: int) -> list[tuple[str, float]]:
    """The loads of a round that were not measured on a system yet."""
    done = {(row.load, row.value) for row in results.rows if (row.system, row.round) == (system.name, number)}
    return [load for load in loads(comparison) if load not in done]


def same_machine(before: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Raises ComparisonError where results were kept on another machine."""
    for name in ("cpu", "cores", "threads", "instructions"):
        if here.get(name) != before.get(name):
            raise ComparisonError(
                f"the kept results are of another machine: its {name} is {before.get(name)!r}, and here "
                f"{here.get(name)!r}"
            )


def go_on_from(before: Results, results: Results) -> None:
    """Take over what was measured. Raises ComparisonError where it was another comparison or another machine."""
    asked, found = (msgspec.json.decode(msgspec.json.encode(own.comparison)) for own in (results, before))
    for content in (asked, found):
        content.pop("rounds", None)
    for name in asked.keys() | found.keys():
        if asked.get(name) != found.get(name):
            raise ComparisonError(f"the kept results are of another comparison: its {name} is {found.get(name)!r}")
    same_machine(before.machine, results.machine)
    results.rows += before.rows
    results.machine["begun"] = before.machine.get("begun", before.date)
    old = {system.name: system for system in before.systems}
    for system in results.systems:
        if system.name in old:
            system.start_s, system.memory_bytes = old[system.name].start_s, old[system.name].memory_bytes
