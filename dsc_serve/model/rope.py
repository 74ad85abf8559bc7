"""Rotary positions: the angles by which queries and keys are turned, and what stretches them to longer contexts."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsc_serve.model.schema import Size, Strict

ROWS = 2**14  # of the table that are computed at a time
Positive = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(ge=1)]


class LinearRope(Strict):
    """Positions divided by `factor`."""

    rope_type: Literal["linear"]
    factor: Factor

    def stretched(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / self.factor


class Llama3Rope(Strict):
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

    def stretched(self, frequencies: Tensor, theta: float) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class YarnRope(Strict):
    """As llama3, blended linearly over the dimensions, with larger angles' attention scaled (arXiv 2309.00071)."""

    rope_type: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: Size
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def stretched(self, frequencies: Tensor, theta: float) -> Tensor:
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
        """What cosines and sines are multiplied by."""

        def scale(m: float) -> float:
            return 0.1 * m * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


class DivisorsRope(Strict):
    """Each frequency divided by a number of its own, as GGUF files store llama3's scaling."""

    rope_type: Literal["divisors"]
    divisors: list[Positive]

    def stretched(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / torch.tensor(self.divisors, dtype=frequencies.dtype)


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope | DivisorsRope, Field(discriminator="rope_type")]


def rope_table(head_dim: int, positions: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """cos and sin of every position's angles: float32 [positions, 2, head_dim / 2]."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is not None:
        frequencies = scaling.stretched(frequencies, theta)
    magnitude = scaling.magnitude if isinstance(scaling, YarnRope) else 1.0
    table = torch.empty(positions, 2, frequencies.shape[0])
    for start in range(0, positions, ROWS):  # float64 of all at once would take five times the table
        rows = torch.arange(start, min(start + ROWS, positions), dtype=torch.float64)
        angles = rows[:, None] * frequencies
        table[start : start + ROWS] = magnitude * torch.stack((angles.cos(), angles.sin()), dim=1)
    return table
