"""A machine's measured steps, as they are kept in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dsc_serve.bench.compare.results import write_whole
from dsc_serve.bench.decide.sizes import DecideError, ModelFrame
from dsc_serve.bench.decide.step_terms import SYSTEMS, ServedForm, StepShape


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """The lower quartile of the milliseconds of a kind of step."""

    size: str  # a name of the machine's sizes
    system: str
    form: ServedForm
    step: StepShape
    ms: Annotated[float, Meta(gt=0)]


class MeasuredMachine(msgspec.Struct, kw_only=True):
    """All that was measured."""

    date: str
    machine: dict[str, Any]  # what it is, and how busy it was
    sizes: dict[str, ModelFrame]
    steps: list[MeasuredStep] = []

    def weights(self) -> list[str]:
        return list(dict.fromkeys(row.form.weights for row in self.steps))

    def systems(self, weights: str) -> list[str]:
        """Those that were measured with weights in this form, in the order of the registry."""
        found = {row.system for row in self.steps if row.form.weights == weights}
        return [name for name in SYSTEMS if name in found]

    def form_of(self, system: str, weights: str) -> ServedForm:
        """How the largest measured model of a kind was held: larger ones are held so too."""
        rows = [row for row in self.steps if (row.system, row.form.weights) == (system, weights)]
        return max(rows, key=lambda row: self.sizes[row.size].total).form

    @property
    def largest(self) -> ModelFrame:
        return max((self.sizes[row.size] for row in self.steps), key=lambda frame: frame.total)


def save_machine(measured: MeasuredMachine, path: Path) -> None:
    """Written whole or not at all. Raises OSError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(measured), indent=1) + b"\n")


def load_machine(path: Path) -> MeasuredMachine:
    """Raises DecideError in one line."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=MeasuredMachine)
    except OSError as error:
        raise DecideError(f"{path} cannot be read: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise DecideError(f"{path} is not a measured machine: {error}") from None
    for row in found.steps:
        if row.system not in SYSTEMS:
            raise DecideError(f"{path}: system {row.system!r} is not known; it must be one of {', '.join(SYSTEMS)}")
        if row.size not in found.sizes:
            raise DecideError(f"{path}: a step is of size {row.size!r}, and sizes has {', '.join(found.sizes)}")
    return found
