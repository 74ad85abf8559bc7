"""Sizes of models: those that a machine is measured with, and those that are asked about."""

from __future__ import annotations

import math
import re

import msgspec

from dsc_serve.model.budget import ParameterBudget
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.initial import PRESETS, budget_config

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
COUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([KMBG]?)", re.IGNORECASE)
HEAD = 64  # numbers of a head
WIDTHS = range(HEAD, 8192 + 1, HEAD)
SHAPE = 48  # d / L of a frame that nobody gave; the presets have 64 and 43
LEAST_FRAME, MOST_FRAME = 0.4, 0.85  # share of the active parameters outside the FFNs


class DecideError(ValueError):
    """A question that cannot be answered, or a machine that cannot be measured; one line that says why."""


class ModelFrame(msgspec.Struct, frozen=True):
    """What models of all kinds of FFN share, and their sizes: total and active parameters."""

    total: float
    active: float
    layers: int
    width: int
    vocab_size: int
    context: int  # positions

    @property
    def budget(self) -> ParameterBudget:
        """Raises DecideError where no model is as small."""
        sizes = (self.total, self.active, self.vocab_size, self.context, self.layers, self.width)
        try:
            return ParameterBudget(*sizes)
        except ValueError as error:
            raise DecideError(f"no such model: {error}") from None

    def config(self, ffn: str) -> ModelConfig:
        """Of a model with FFNs of this kind. Raises DecideError where the budget leaves them no room."""
        budget = self.budget
        try:
            return budget_config(budget, self.width // HEAD, ffn)
        except ValueError as error:
            raise DecideError(f"no such {ffn} model: {error}") from None

    def __str__(self) -> str:
        return f"{self.layers} layers, d {self.width}, vocabulary {self.vocab_size:,}"


# From overheads alone to weights that no cache holds.
MEASURED_SIZES = {
    "small": ModelFrame(12e6, 9e6, 4, 256, 16384, 512),
    "paper": ModelFrame(35e6, 28e6, 6, 384, 50304, 512),
    "middle": ModelFrame(120e6, 80e6, 12, 640, 32768, 512),
    "wide": ModelFrame(200e6, 130e6, 8, 1024, 50304, 512),
}


def parameters(option: str, text: str) -> float:
    """A number of parameters such as 400M, 1.2B or 35000000. Raises DecideError naming the option."""
    found = COUNT.fullmatch(text.strip())
    count = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
    if not 1e5 <= count <= 1e12:
        raise DecideError(f"{option} is {text!r}; it must be a number of parameters from 100K to 1000B, such as 400M")
    return count


def frame_for(
    total: float, active: float, layers: int | None, width: int | None, vocab_size: int, context: int
) -> ModelFrame:
    """The frame of models of these sizes: the preset's that has them, or the given one, or one of usual shape.

    Of those of usual shape (d = 48 L, multiples of 64) it is the one whose share of the active parameters is the
    nearest to what lies on a line, over their logarithm, through the presets' shares. Raises DecideError.
    """
    if total < active:
        raise DecideError(f"--params is {total:g}, less than --active, {active:g}; it must be at least as many")
    if (layers is None) != (width is None):
        raise DecideError("--layers and --width must be given together, or neither")
    if layers is not None and width is not None:
        if width % HEAD:
            raise DecideError(f"--width is {width}; it must be a multiple of {HEAD}")
        return checked(ModelFrame(total, active, layers, width, vocab_size, context))
    for preset in PRESETS.values():
        own = preset.budget
        if (own.total, own.active, own.vocab_size) == (total, active, vocab_size):
            return ModelFrame(total, active, own.layers, own.width, vocab_size, context)
    wanted, found = frame_share(active), list[ModelFrame]()
    for d in WIDTHS:
        frame = ModelFrame(total, active, max(2, round(d / SHAPE)), d, vocab_size, context)
        try:
            found.append(checked(frame))
        except DecideError:
            continue
    if not found:
        raise DecideError(
            f"--active is {active:g} of {total:g} parameters with a vocabulary of {vocab_size:,}: no frame of usual "
            "shape leaves room for FFNs of every kind; --vocab, or --layers and --width, can say another"
        )
    return min(found, key=lambda frame: abs(frame.budget.fixed / active - wanted))


def frame_share(active: float) -> float:
    """The share of the active parameters outside the FFNs, by the presets."""
    (small, one), (large, other) = ((p.budget.active, p.budget.fixed / p.budget.active) for p in PRESETS.values())
    slope = (other - one) / math.log(large / small)
    return min(MOST_FRAME, max(LEAST_FRAME, one + slope * math.log(active / small)))


def checked(frame: ModelFrame) -> ModelFrame:
    """The frame, if it has models of every kind. Raises DecideError."""
    for ffn in ("dsc", "moe", "molora", "dense"):
        frame.config(ffn)
    return frame
