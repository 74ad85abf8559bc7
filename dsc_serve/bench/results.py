"""What a comparison found, as it is kept in JSON, and the figures that tables and sentences are made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from dsc_serve.bench.comparison import ComparisonError


class Contestant(msgspec.Struct, kw_only=True):
    """One system of a comparison. skipped: why it was not measured; empty where it was.

    command: as it was started. description: see `inside.describe`. steps: see `inside.decode_step`, by running
    requests. memory_bytes: of all its processes after the first round. start_s: seconds until it answered.
    """

    name: str
    command: str = ""
    skipped: str = ""
    version: str = ""
    weights: str = ""
    start_s: float = 0.0
    memory_bytes: int = 0
    description: dict[str, Any] = {}
    steps: dict[str, dict[str, Any]] = {}


class Row(msgspec.Struct, kw_only=True):
    """One load on one system in one round.

    value: streams of a closed loop, or the multiple of the baseline's peak of an open one. figures: see
    `LoadResult.to_dict`, without what all rows share. server_cpu, others_cpu: cores that the system itself used while
    it was measured, and those that the waiting ones used.
    """

    system: str
    load: Literal["closed", "open"]
    value: float
    round: int
    figures: dict[str, Any]
    server_cpu: float = 0.0
    others_cpu: float = 0.0

    @property
    def point(self) -> tuple[str, float]:
        return self.load, self.value


class Results(msgspec.Struct, kw_only=True):
    """All of a comparison; `comparison` is what it was asked for, `client` the command that asked."""

    title: str
    date: str
    client: str
    machine: dict[str, Any]
    comparison: dict[str, Any]
    systems: list[Contestant] = []
    rows: list[Row] = []

    def measured(self) -> list[str]:
        """The systems that were measured, in order."""
        seen = {row.system for row in self.rows}
        return [system.name for system in self.systems if system.name in seen]

    def points(self, load: str) -> list[float]:
        return sorted({row.value for row in self.rows if row.load == load})

    def values(self, system: str, load: str, value: float, figure: str) -> dict[int, float]:
        """A figure by round, of the rounds that have it."""
        rows = (row for row in self.rows if (row.system, row.load, row.value) == (system, load, value))
        return {row.round: row.figures[figure] for row in rows if row.figures.get(figure) is not None}

    def median(self, system: str, load: str, value: float, figure: str) -> float | None:
        """The figure's median over rounds; None where it was not measured."""
        found = self.values(system, load, value, figure)
        return statistics.median(found.values()) if found else None

    def ratio(self, subject: str, against: str, load: str, value: float, figure: str) -> Ratio | None:
        """The figures of two systems divided round by round; None where no round has both."""
        one, other = self.values(subject, load, value, figure), self.values(against, load, value, figure)
        ratios = [one[number] / other[number] for number in one if other.get(number)]
        return Ratio.of(ratios) if ratios else None


class Ratio(msgspec.Struct, frozen=True):
    """The median, least and largest of ratios, one a round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def save_results(results: Results, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def load_results(path: Path) -> Results:
    """Raises ComparisonError in one line."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise ComparisonError(f"{path} cannot be read: {error}") from None
    except msgspec.DecodeError as error:
        raise ComparisonError(f"{path} is not a comparison's result: {error}") from None
