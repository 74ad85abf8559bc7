"""What a comparison of speculation found, as it is kept in JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.results import Ratio, write_whole
from dsc_serve.bench.compare.resuming import same_machine
from dsc_serve.bench.compare.speculation.asked import SpeculationComparison, comparable


class DraftedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    preset: str
    system: str
    streams: int
    round: int
    rate: float | None  # how often drafts were right; None: none
    ms: float  # wall time for each output token of one stream, from when all streams had begun
    drafts: float = 0.0  # for each step and stream
    right: float = 0.0  # their share that was kept


class StepWidthRow(msgspec.Struct, frozen=True, kw_only=True):
    """The median step, in milliseconds, in which each stream computes so many drafts, and how many distinct rows of a
    layer's bank it reads on average: experts, adapters or atoms, None for what has none.
    """

    preset: str
    system: str
    streams: int
    width: int
    step_ms: float
    distinct: float | None = None


class TextRow(msgspec.Struct, frozen=True, kw_only=True):
    """One task of real work, once without and once with drafts, decoding alone."""

    task: str
    round: int
    tokens: int
    ms_without: float  # for each token after the first
    ms_with: float
    drafted: dict[str, int]  # by source
    accepted: dict[str, int]
    same: bool  # whether the answers are

    @property
    def gain(self) -> float:
        return self.ms_without / self.ms_with


class SpeculationResults(msgspec.Struct, kw_only=True):
    """All of it."""

    date: str
    client: str
    machine: dict[str, Any]
    asked: SpeculationComparison
    text_model: str = ""
    parameters: dict[str, dict[str, tuple[int, int]]] = {}  # of each preset and system, all and active
    drafted: list[DraftedRow] = []
    widths: list[StepWidthRow] = []
    texts: list[TextRow] = []

    def ms(self, preset: str, system: str, streams: int, rate: float | None) -> dict[int, float]:
        """Milliseconds a token, by round."""
        wanted = preset, system, streams, rate
        return {row.round: row.ms for row in self.drafted if (row.preset, row.system, row.streams, row.rate) == wanted}

    def ratio(
        self, preset: str, streams: int, one: tuple[str, float | None], other: tuple[str, float | None]
    ) -> Ratio | None:
        """How many times as many tokens one system draws as the other, each at its rate, round by round."""
        ratios = self.ratios(preset, streams, one, other)
        return Ratio.of(list(ratios.values())) if ratios else None

    def ratios(
        self, preset: str, streams: int, one: tuple[str, float | None], other: tuple[str, float | None]
    ) -> dict[int, float]:
        """The same by round."""
        ours, theirs = self.ms(preset, one[0], streams, one[1]), self.ms(preset, other[0], streams, other[1])
        return {number: theirs[number] / ours[number] for number in sorted(ours) if number in theirs}

    def median(self, preset: str, system: str, streams: int, rate: float | None, figure: str) -> float | None:
        wanted = preset, system, streams, rate
        rows = [row for row in self.drafted if (row.preset, row.system, row.streams, row.rate) == wanted]
        return statistics.median(getattr(row, figure) for row in rows) if rows else None


Keep = Callable[[SpeculationResults], None]


def save(results: SpeculationResults, path: Path) -> None:
    """Written whole or not at all. Raises OSError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def load(path: Path) -> SpeculationResults:
    """Raises ComparisonError in one line."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SpeculationResults)
    except OSError as error:
        raise ComparisonError(f"{path} cannot be read: {error}") from None
    except msgspec.DecodeError as error:
        raise ComparisonError(f"{path} is not the result of a comparison of speculation: {error}") from None


def is_kept_in(path: Path) -> bool:
    """Whether a file holds results of this kind, and not of a comparison of servers."""
    try:
        return "asked" in msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError):
        return False


def go_on(before: SpeculationResults, results: SpeculationResults) -> None:
    """Take over what was measured. Raises ComparisonError where it was another comparison or another machine."""
    asked, found = comparable(results.asked), comparable(before.asked)
    for name, value in asked.items():
        if found.get(name) != value:
            raise ComparisonError(f"the kept results are of another comparison: its {name} is {found.get(name)!r}")
    if before.text_model and results.text_model and before.text_model != results.text_model:
        raise ComparisonError(f"the kept results are of another text model: {before.text_model}")
    same_machine(before.machine, results.machine)
    results.text_model = results.text_model or before.text_model
    results.machine["begun"] = before.machine.get("begun", before.date)
    results.parameters = before.parameters
    results.drafted, results.widths, results.texts = before.drafted, before.widths, before.texts
