"""Rotary positions: the angles by which queries and keys are turned, and what stretches them to longer contexts."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsc_kernels.memory import zeros
from dsc_serve.model.schema import Size, Strict

Positive = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(ge=1)]
Magnitude = Annotated[float, Field(ge=0, le=1000)]
Turns = Annotated[float, Field(ge=1e-3, le=1e6)]
MOST_POSITIONS = 2**62
AHEAD = 4096  # positions that are filled in together


def lengthened(context: int, factor: float) -> int:
    """The positions for which linear scaling and YaRN by this factor make a model that was trained with so many.

    At most MOST_POSITIONS, which no configuration may have: what overflows is refused by it.
    """
    return int(min(context * factor, MOST_POSITIONS)) if math.isfinite(factor) and factor > 1 else context


class Scaling(Strict):
    """What stretches positions."""

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        """The frequencies [half of the turned numbers] of a model that serves so many positions."""
        raise NotImplementedError

    @property
    def divided(self) -> list[tuple[str, list[float]]]:
        """Fields that hold a number for each frequency."""
        return []


class LinearRope(Scaling):
    """Positions divided by `factor`; cosines and sines multiplied by `attention_factor`."""

    rope_type: Literal["linear"]
    factor: Factor
    attention_factor: Positive = 1.0

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        return frequencies / self.factor


class DynamicRope(Scaling):
    """Nothing changes up to the length that the model was trained with, and more is not served.

    Beyond it every token would change the angles of all before it, whose keys are cached.
    """

    rope_type: Literal["dynamic"]
    factor: Factor

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        return frequencies


class Llama3Rope(Scaling):
    """Low frequencies divided by `factor`, high ones kept, those between blended."""

    rope_type: Literal["llama3"]
    factor: Factor
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Rope:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}; it must be above low_freq_factor, {self.low_freq_factor}"
            )
        return self

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class YarnRope(Scaling):
    """As llama3, blended linearly over the dimensions, with larger angles' attention scaled (arXiv 2309.00071)."""

    rope_type: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: Size
    beta_fast: Turns = 32.0
    beta_slow: Turns = 1.0
    attention_factor: Positive | None = None
    mscale: Magnitude | None = None
    mscale_all_dim: Magnitude | None = None
    truncate: bool = True

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        half = frequencies.shape[0]

        def dimension(turns: float) -> float:
            return half * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low if high != low else 0.001
        divided = ((torch.arange(half, dtype=frequencies.dtype) - low) / width).clamp(0, 1)
        return frequencies * (1 - divided + divided / self.factor)

    @property
    def magnitude(self) -> float:
        def scale(m: float) -> float:
            return 0.1 * m * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


class DivisorsRope(Scaling):
    """Each frequency divided by a number of its own, as GGUF files store llama3's scaling."""

    rope_type: Literal["divisors"]
    divisors: list[Positive]
    attention_factor: Positive = 1.0

    @property
    def divided(self) -> list[tuple[str, list[float]]]:
        return [("divisors", self.divisors)]

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        return frequencies / torch.tensor(self.divisors, dtype=frequencies.dtype)


class LongRope(Scaling):
    """Each frequency divided by a number of one list up to the length of the first training, of another beyond it.

    The positions that are served decide which, for every text: were it each text's own length, a text that grows beyond
    the first length would change the angles of all its keys, which are cached.
    """

    rope_type: Literal["longrope"]
    short_factor: list[Positive]
    long_factor: list[Positive]
    original_max_position_embeddings: Size
    max_position_embeddings: Size
    attention_factor: Positive | None = None

    @property
    def magnitude(self) -> float:
        original = self.original_max_position_embeddings
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.max_position_embeddings / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0

    def stretched(self, frequencies: Tensor, theta: float, positions: int) -> Tensor:
        own = self.long_factor if positions > self.original_max_position_embeddings else self.short_factor
        return frequencies / torch.tensor(own, dtype=frequencies.dtype)

    @property
    def divided(self) -> list[tuple[str, list[float]]]:
        return [("short_factor", self.short_factor), ("long_factor", self.long_factor)]


RopeScaling = Annotated[
    LinearRope | DynamicRope | Llama3Rope | YarnRope | DivisorsRope | LongRope, Field(discriminator="rope_type")
]


class Angles(NamedTuple):
    """What decides a table's angles: numbers of a head that are turned, positions, the base, what stretches them."""

    turned: int
    positions: int
    theta: float
    scaling: RopeScaling | None


class RopeTable:
    """cos and sin of every position's angles, float32 [positions, 2, turned / 2], filled in as positions are reached.

    On the CPU what has not been reached takes no memory; elsewhere, where steps are replayed without asking, all is
    filled in at once. turned: numbers of a head that are turned.
    """

    def __init__(
        self,
        turned: int,
        positions: int,
        theta: float,
        scaling: RopeScaling | None = None,
        device: torch.device | None = None,
    ) -> None:
        frequencies = theta ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
        self._frequencies = frequencies if scaling is None else scaling.stretched(frequencies, theta, positions)
        self._magnitude = 1.0 if scaling is None else scaling.magnitude
        self.filled = 0
        self.table = zeros((positions, 2, turned // 2), torch.float32, device)
        if self.table.device.type != "cpu":
            self.reach(positions)

    def reach(self, positions: int) -> None:
        """Have so many positions filled in, of as many as there are."""
        if positions <= self.filled:
            return
        end = min(-(-positions // AHEAD) * AHEAD, len(self.table))
        for start in range(self.filled, end, AHEAD):
            rows = self.table[start : start + AHEAD]
            angles = torch.arange(start, start + len(rows), dtype=torch.float64)[:, None] * self._frequencies
            rows.copy_((self._magnitude * torch.stack((angles.cos(), angles.sin()), dim=1)).float())
        self.filled = max(self.filled, end)


def rope_table(turned: int, positions: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """A `RopeTable` all filled in: float32 [positions, 2, turned / 2]."""
    whole = RopeTable(turned, positions, theta, scaling)
    whole.reach(positions)
    return whole.table
