"""Tensors in 4 and 8 bits as files hold them, of any number of dimensions: what becomes a `QuantisedWeight`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsc_kernels.quantised import Bits, QuantisedWeight, Weight, concatenated

VALUES, SCALES, MINIMUMS, LEFT, RIGHT = "values", "scales", "minimums", "left", "right"


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """w = scale · q + minimum, of `group` neighbours in the last dimension each; the fields as in `QuantisedWeight`."""

    values: Tensor  # int8 [..., in], or with 4 bits uint8 [..., ⌈in / 2⌉]
    scales: Tensor  # float16 [..., ⌈in / group⌉]
    minimums: Tensor | None  # the same, where there are any
    bits: Bits
    group: int
    shape: tuple[int, ...]
    left: Tensor | None = None  # [..., rank], of a product that is added
    right: Tensor | None = None  # [rank, in]

    @property
    def parts(self) -> dict[str, Tensor]:
        """What it consists of, by field."""
        named = {name: getattr(self, name) for name in (VALUES, SCALES, MINIMUMS, LEFT, RIGHT)}
        return {name: part for name, part in named.items() if part is not None}

    def mapped(self, take: Callable[[Tensor], Tensor]) -> QuantisedTensor:
        """With the rows that `take` chooses and orders, which does not look into them."""
        own = {name: take(part).contiguous() for name, part in self.parts.items() if name != RIGHT}
        return replace(self, **own, shape=(*own[SCALES].shape[:-1], self.shape[-1]))  # type: ignore[arg-type]

    def scaled(self, factor: float) -> QuantisedTensor:
        """Times a number; scales are rounded to float16 again."""
        own = {name: part * factor for name, part in self.parts.items() if name in (SCALES, MINIMUMS, LEFT)}
        return replace(self, **own)  # type: ignore[arg-type]

    def weight(self, dtype: torch.dtype = torch.float32) -> QuantisedWeight:
        """As layers of this dtype take it. Raises ValueError unless it has two dimensions and is finite."""
        rows, columns = self.shape
        low = None if self.left is None or self.right is None else (self.left, self.right)
        return QuantisedWeight(
            self.values, self.scales, self.minimums, self.bits, self.group, (rows, columns), low, dtype
        )

    def dequantised(self) -> Tensor:
        """float32 [..., in], with what is added; not finite where a scale is not."""
        q = self.values
        if self.bits == 4:
            q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)[..., : self.shape[-1]]
        wide = q.float().mul_(self._spread(self.scales))
        if self.minimums is not None:
            wide += self._spread(self.minimums)
        if self.left is not None and self.right is not None:
            wide += self.left.float() @ self.right.float()
        return wide

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.float().repeat_interleave(self.group, dim=-1)[..., : self.shape[-1]]

    def wrong(self) -> tuple[str, int] | None:
        """A field that holds numbers that are not finite, and how many; None where all are."""
        for name, part in self.parts.items():
            if part.dtype.is_floating_point and (bad := int((~part.isfinite()).sum())):
                return name, bad
        return None


def packed(levels: Tensor, bits: Bits) -> Tensor:
    """Levels q [..., in] as they are stored: in 8 bits int8, in 4, of 0 … 15, two in a byte."""
    if bits == 8:
        return levels.to(torch.int8)
    if levels.shape[-1] % 2:
        levels = torch.nn.functional.pad(levels, (0, 1))
    low, high = levels.to(torch.uint8).reshape(*levels.shape[:-1], -1, 2).unbind(-1)
    return low | high << 4


def widened(own: QuantisedWeight, bits: Bits, group: int, minimum: bool = False) -> QuantisedWeight:
    """The same values in as many bits or more, in groups as large or smaller, with minimums where asked for."""
    columns = own.shape[1]
    values = own.values if bits == own.bits else packed(own.levels(), bits)
    groups = -(-columns // group)
    scales, minimums = (
        None if part is None else part.repeat_interleave(own.group // group, dim=1)[:, :groups].contiguous()
        for part in (own.scales, own.minimums)
    )
    assert scales is not None
    if minimum and minimums is None:
        minimums = torch.zeros_like(scales)
    return replace(own, values=values, scales=scales, minimums=minimums, bits=bits, group=group)


def alike(weights: Sequence[QuantisedWeight]) -> list[QuantisedWeight]:
    """The same values, all in the one form that holds each: where some take 8 bits and others 4, in 8."""
    bits: Bits = 8 if any(own.bits == 8 for own in weights) else 4
    group, minimum = min(own.group for own in weights), any(own.minimums is not None for own in weights)
    rank = max(own.rank for own in weights)
    return [filled(widened(own, bits, group, minimum), rank) for own in weights]


def filled(own: QuantisedWeight, rank: int) -> QuantisedWeight:
    """With a compensation of this rank at least; what is new of it is 0."""
    if own.rank >= rank:
        return own
    rows, columns = own.shape
    left, right = own.compensation or (own.scales.new_zeros(rows, 0), own.scales.new_zeros(0, columns))
    more = rank - own.rank
    left, right = torch.cat((left, left.new_zeros(rows, more)), 1), torch.cat((right, right.new_zeros(more, columns)))
    return replace(own, compensation=(left, right))


def joined(weights: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """One above the other, [rows of all, in]; as tensors of this dtype where one of them is a tensor."""
    quantised = [own for own in weights if isinstance(own, QuantisedWeight)]
    if len(quantised) == len(weights):
        bits: Bits = 8 if any(own.bits == 8 for own in quantised) else 4
        group = min(own.group for own in quantised)
        return concatenated([widened(own, bits, group) for own in quantised])
    return torch.cat([as_tensor(own, dtype) for own in weights])


def as_tensor(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight in floating point, whatever it is stored in, with its compensation."""
    return weight.whole(dtype) if isinstance(weight, QuantisedWeight) else weight.to(dtype)
