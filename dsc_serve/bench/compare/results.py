"""What a comparison found, as it is kept in JSON, and the figures that tables and sentences are made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from dsc_serve.bench.compare.comparison import ComparisonError

MOST_FAILED = 0.1  # of a closed loop's requests; with more gone it was another load than the one asked for


class Contestant(msgspec.Struct, kw_only=True):
    """One system of a comparison."""

    name: str
    command: str = ""  # as it was started
    skipped: str = ""  # why it was not measured, or not to the end; empty where it was
    version: str = ""
    weights: str = ""
    start_s: float = 0.0  # until it answered
    memory_bytes: int = 0  # of all its processes after the first round
    description: dict[str, Any] = {}  # see `inspect_model.describe`
    steps: dict[str, dict[str, Any]] = {}  # by running requests; see `inspect_model.decode_step`


class ResultRow(msgspec.Struct, kw_only=True):
    """One load on one system in one round."""

    system: str
    load: Literal["closed", "open"]
    value: float  # streams of a closed loop, or the multiple of the baseline's peak of an open one
    round: int
    figures: dict[str, Any]  # see `LoadResult.to_dict`, without what all rows share
    server_cpu: float = 0.0  # cores that the system itself used while it was measured
    others_cpu: float = 0.0  # cores that the waiting ones used meanwhile

    @property
    def counts(self) -> bool:
        """Whether its figures are of the load that was asked for; an open one stays that, whatever is refused."""
        failed, completed = self.figures["failed"], self.figures["completed"]
        return self.load == "open" or failed <= MOST_FAILED * (failed + completed)

    @property
    def kept(self) -> float | None:
        """The share of all its requests, failed ones too, that kept the limits; None without limits."""
        asked, goodput = self.figures["failed"] + self.figures["completed"], self.figures["request_goodput"]
        return goodput * self.figures["duration"] / asked if asked and goodput is not None else None


class Results(msgspec.Struct, kw_only=True):
    """All of a comparison; `comparison` is what it was asked for, `client` the command that asked."""

    title: str
    date: str
    client: str
    machine: dict[str, Any]
    comparison: dict[str, Any]
    systems: list[Contestant] = []
    rows: list[ResultRow] = []

    def measured(self) -> list[str]:
        """The systems that were measured, in order."""
        seen = {row.system for row in self.rows}
        return [system.name for system in self.systems if system.name in seen]

    def label(self, name: str) -> str:
        """A system's name for tables: with its parameters where the comparison has them said."""
        what = next((system.description for system in self.systems if system.name == name), {})
        total, active = what.get("parameters"), what.get("active")
        if not self.comparison.get("sizes") or total is None or active is None:
            return name
        return f"{name} ({total / 1e6:.0f} M, {active / 1e6:.0f} M active)"

    def points(self, load: str) -> list[float]:
        return sorted({row.value for row in self.rows if row.load == load})

    def values(self, system: str, load: str, value: float, figure: str) -> dict[int, float]:
        """A figure by round, of the rounds that have it and count."""
        rows = (row for row in self.of(system, load, value) if row.counts)
        return {row.round: row.figures[figure] for row in rows if row.figures.get(figure) is not None}

    def of(self, system: str, load: str, value: float) -> list[ResultRow]:
        """All rounds of one load on one system."""
        return [row for row in self.rows if (row.system, row.load, row.value) == (system, load, value)]

    @property
    def rounds(self) -> int:
        """Rounds of which anything was measured."""
        return len({row.round for row in self.rows})

    def median(self, system: str, load: str, value: float, figure: str) -> float | None:
        """The figure's median over rounds; None where it was not measured."""
        found = self.values(system, load, value, figure)
        return statistics.median(found.values()) if found else None

    def ratio(self, subject: str, against: str, load: str, value: float, figure: str) -> Ratio | None:
        """The figures of two systems divided round by round; None where no round has both."""
        ratios = self.ratios(subject, against, load, value, figure)
        return Ratio.of(list(ratios.values())) if ratios else None

    def ratios(self, subject: str, against: str, load: str, value: float, figure: str) -> dict[int, float]:
        """The same by round."""
        one, other = self.values(subject, load, value, figure), self.values(against, load, value, figure)
        return {number: one[number] / other[number] for number in sorted(one) if other.get(number)}


class Ratio(msgspec.Struct, frozen=True):
    """The median, least and largest of ratios, one a round."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def save_results(results: Results, path: Path) -> None:
    """Raises OSError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Written whole or not at all, so that a full disk leaves what was kept before. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def is_compared(path: Path) -> bool:
    """Whether a file holds the results of a comparison of servers."""
    try:
        return "comparison" in msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError):
        return False


def load_results(path: Path) -> Results:
    """Raises ComparisonError in one line."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise ComparisonError(f"{path} cannot be read: {error}") from None
    except msgspec.DecodeError as error:
        raise ComparisonError(f"{path} is not a comparison's result: {error}") from None
