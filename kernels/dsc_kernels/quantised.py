"""Weights in 4 and 8 bits: groups of neighbouring inputs share a scale, and where there is one, a minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]
ActivationBits = Literal[8, 16]
GROUPS = (16, 32)


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A matrix W [out, in] with w = scale · q + minimum; q int8 in 8 bits, and 0 … 15 in 4.

    The last group of a row may be shorter than the others: there are ⌈in / group⌉ of them.
    Raises ValueError for what does not fit or is not finite, naming the field.
    """

    values: Tensor  # 8 bits: int8 [out, in]; 4: uint8 [out, ⌈in / 2⌉], column 2i in a byte's low half, 2i + 1 above
    scales: Tensor  # float16 [out, groups]
    minimums: Tensor | None  # float16 [out, groups]; None: 0
    bits: Bits
    group: int  # inputs that share a scale: 16 or 32
    shape: tuple[int, int]  # (out, in)
    compensation: tuple[Tensor, Tensor] | None = None  # left [out, r], right [r, in]: y = W x + left (right x)
    dtype: torch.dtype = torch.bfloat16  # of the inputs and outputs of its products
    activation_bits: ActivationBits = 16  # that native products round inputs to; other backends take them as they are

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; allowed: 4 and 8")
        if self.group not in GROUPS:
            raise ValueError(f"group is {self.group}; allowed: {', '.join(map(str, GROUPS))}")
        rows, columns = self.shape
        if rows < 1 or columns < 1:
            raise ValueError(f"shape is {tuple(self.shape)}; its sizes must be at least 1")
        object.__setattr__(self, "shape", (int(rows), int(columns)))
        groups = -(-columns // self.group)
        packed = (rows, columns) if self.bits == 8 else (rows, -(-columns // 2))
        fits("values", self.values, packed, torch.int8 if self.bits == 8 else torch.uint8)
        fits("scales", self.scales, (rows, groups), torch.float16)
        if self.minimums is not None:
            fits("minimums", self.minimums, (rows, groups), torch.float16)
        if self.compensation is not None:
            left, right = self.compensation
            rank = left.shape[1] if left.dim() == 2 else 0
            if rank < 1:
                raise ValueError(f"compensation's left is {list(left.shape)}; expected [{rows}, at least 1]")
            fits("compensation's left", left, (rows, rank))
            fits("compensation's right", right, (rank, columns))
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is {self.dtype}; a layer computes in a floating-point one")
        if self.activation_bits not in (8, 16):
            raise ValueError(f"activation_bits is {self.activation_bits}; allowed: 8 and 16")

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is of it, by field; the compensation's two by `left` and `right`."""
        found = {"values": self.values, "scales": self.scales}
        if self.minimums is not None:
            found["minimums"] = self.minimums
        if self.compensation is not None:
            found["left"], found["right"] = self.compensation
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def rank(self) -> int:
        """Of the compensation; 0 without one."""
        return 0 if self.compensation is None else self.compensation[0].shape[1]

    def levels(self) -> Tensor:
        """q, one number each: int8 [out, in], or uint8 in 4 bits."""
        return self._levels(self.values)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in] without its compensation, computed in float32, or in float64 where that is asked for."""
        return self.take(slice(None), dtype)

    def take(self, index: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same of some rows: [*index.shape, in]."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        w = self._levels(self.values[index]).to(wide) * self._spread(self.scales[index], wide)
        if self.minimums is not None:
            w += self._spread(self.minimums[index], wide)
        return w.to(dtype)

    def _levels(self, values: Tensor) -> Tensor:
        if self.bits == 8:
            return values
        return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)[..., : self.shape[1]]

    def _spread(self, per_group: Tensor, dtype: torch.dtype) -> Tensor:
        return per_group.to(dtype).repeat_interleave(self.group, dim=-1)[..., : self.shape[1]]

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same with its compensation."""
        w = self.dequantise(torch.float64 if dtype == torch.float64 else torch.float32)
        if self.compensation is not None:
            left, right = (side.to(w.dtype) for side in self.compensation)
            w = w + left @ right
        return w.to(dtype)

    def to(self, dtype: torch.dtype) -> QuantisedWeight:
        """The same for a layer of another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def map(self, move: Callable[[Tensor], Tensor]) -> QuantisedWeight:
        """The same with all its tensors moved, to another device or other memory."""
        compensation = None
        if self.compensation is not None:
            left, right = self.compensation
            compensation = move(left), move(right)
        minimums = None if self.minimums is None else move(self.minimums)
        return replace(
            self, values=move(self.values), scales=move(self.scales), minimums=minimums, compensation=compensation
        )

    def rows(self, index: Tensor | slice) -> QuantisedWeight:
        """Some of its rows: those of an index [n] or a slice."""
        values, scales = self.values[index], self.scales[index]
        minimums = None if self.minimums is None else self.minimums[index]
        compensation = None
        if self.compensation is not None:
            compensation = self.compensation[0][index], self.compensation[1]
        shape = (values.shape[0], self.shape[1])
        return replace(self, values=values, scales=scales, minimums=minimums, compensation=compensation, shape=shape)


Weight = Tensor | QuantisedWeight


def fits(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless a tensor has this shape and dtype (None: any that floats) and is finite."""
    expected = "a floating-point dtype" if dtype is None else str(dtype)
    good = tensor.dtype == dtype if dtype else tensor.dtype.is_floating_point
    if tuple(tensor.shape) != shape or not good:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {expected} {list(shape)}")
    if tensor.dtype.is_floating_point and not bool(tensor.isfinite().all()):
        where = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} at {where} is {tensor[tuple(where)].item()}; all must be finite")


def concatenated(weights: list[QuantisedWeight]) -> QuantisedWeight:
    """Weights of one width and format, one's outputs after the other's.

    Raises ValueError where bits, group or width differ. Minimums are 0 where some have none; compensations lie beside
    each other, so their ranks add up.
    """
    first = weights[0]
    kinds = [(w.bits, w.group, w.shape[1], w.dtype) for w in weights]
    if len(set(kinds)) != 1:
        raise ValueError(f"weights to concatenate have (bits, group, in, dtype) {kinds}; expected one")
    minimums = None
    if any(w.minimums is not None for w in weights):
        minimums = torch.cat([torch.zeros_like(w.scales) if w.minimums is None else w.minimums for w in weights])
    compensation = None
    sides = [w.compensation for w in weights if w.compensation is not None]
    if sides:
        rank, rows = sum(w.rank for w in weights), sum(w.shape[0] for w in weights)
        left, row, column = sides[0][0].new_zeros(rows, rank), 0, 0
        for w in weights:
            if w.compensation is not None:
                left[row : row + w.shape[0], column : column + w.rank] = w.compensation[0]
            row, column = row + w.shape[0], column + w.rank
        compensation = left, torch.cat([side[1] for side in sides])
    return replace(
        first,
        values=torch.cat([w.values for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        minimums=minimums,
        compensation=compensation,
        shape=(sum(w.shape[0] for w in weights), first.shape[1]),
    )
