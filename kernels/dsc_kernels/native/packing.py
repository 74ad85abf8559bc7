"""Weights as kernels read them: panels of 16 outputs, of numbers or of levels with their groups' scales."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels.memory import resident, zeros
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.screen import LANES, ScreenedRows
from dsc_kernels.native.tensors import address, check, is_bf16
from dsc_kernels.quantised import QuantisedWeight, Weight

PIECE = 1 << 22  # levels that are rearranged at a time
MIDDLE = 8  # of 4 bits; where every minimum is that many steps below 0, none is stored


@dataclass(frozen=True, eq=False)
class Packed:
    """One weight, or several of one shape one after the other."""

    panels: Tensor
    format: Tensor | None = None  # int64, `Format` of cpu/api.h; None: not quantised
    sides: tuple[Tensor, ...] = ()  # of its compensation, whose addresses the format holds

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the panels and of the format."""
        return self.panels.data_ptr(), address(self.format)


def pack(*weights: Tensor) -> Tensor:
    """Weights [N, D] of one shape and dtype, packed one after the other into panels of 16 outputs."""
    first = weights[0]
    n, d = first.shape
    if not n or not d:
        raise ValueError(f"a weight is {first.dtype} {list(first.shape)}; its sizes must be at least 1")
    narrow = is_bf16(first.dtype)
    width = -(-d // 2) * 2 if narrow else d
    packed = torch.empty(len(weights), -(-n // LANES) * LANES * width, dtype=first.dtype)
    for weight, out in zip(weights, packed, strict=True):
        check("a weight", weight, (n, d), first.dtype)
        rows = weight.contiguous()  # under a name: a copy must live until it is packed
        kernels.pack(is_bf16=narrow, w=rows.data_ptr(), n=n, d=d, out=out.data_ptr())
    return packed


_made: weakref.WeakKeyDictionary[QuantisedWeight, weakref.ref[Packed]] = weakref.WeakKeyDictionary()


def packed(*weights: Weight) -> Packed:
    """Weights of one shape and kind, in memory for weights. One that is packed twice shares its memory.

    Raises ValueError where they differ in kind, and for a compensation of a rank beyond `kernels.MAX_RANK`.
    """
    quantised = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    if not quantised:
        return Packed(resident(pack(*(weight for weight in weights if isinstance(weight, Tensor)))))
    if len(quantised) != len(weights):
        raise ValueError(f"{len(quantised)} of {len(weights)} weights of one kind are quantised; all must be, or none")
    if len(quantised) > 1:
        return pack_quantised(quantised)
    made = _made.get(quantised[0])
    found = made() if made else None
    if found is None:
        found = pack_quantised(quantised)
        _made[quantised[0]] = weakref.ref(found)
    return found


def pack_quantised(weights: Sequence[QuantisedWeight]) -> Packed:
    """Quantised weights of one shape and format, one after the other; cpu/quantised.h shows how they lie."""
    first = weights[0]
    kinds = {(w.bits, w.group, w.shape, w.rank, w.dtype, w.activation_bits) for w in weights}
    if len(kinds) > 1:
        what = "(bits, group, shape, rank, dtype, activation_bits)"
        raise ValueError(f"weights of one kind differ in {what}: {sorted(map(str, kinds))}")
    if first.rank > kernels.MAX_RANK:
        raise ValueError(f"a compensation's rank is {first.rank}; it may be at most {kernels.MAX_RANK}")
    if first.device.type != "cpu":
        raise ValueError(f"a quantised weight is on {first.device}; expected the CPU")
    is_bf16(first.dtype)  # raises for other dtypes
    centred = first.bits == 4 and all(map(is_centred, weights))
    minimums = not centred and any(w.minimums is not None for w in weights)
    n, d = first.shape
    panels, groups = -(-n // LANES), -(-d // first.group)
    step = first.group * LANES * first.bits // 8 + (4 if minimums else 2) * LANES
    out = zeros((len(weights), panels, groups, step), torch.uint8)
    rows = max(1, PIECE // (LANES * d)) * LANES
    for weight, own in zip(weights, out, strict=True):
        for start in range(0, n, rows):
            piece = weight.rows(slice(start, start + rows))
            own[start // LANES : start // LANES + -(-piece.shape[0] // LANES)] = panels_of(piece, minimums)
    sides: tuple[Tensor, ...] = ()
    pairs = [w.compensation for w in weights if w.compensation is not None]
    if pairs:
        sides = tuple(resident(pack(*(pair[side].to(first.dtype) for pair in pairs))) for side in (0, 1))
    digits = first.activation_bits // 8
    fields = [first.bits, first.group, MIDDLE if centred else 0, int(minimums), digits, first.rank]
    fields += [side.data_ptr() for side in sides] or [0, 0]
    return Packed(out, torch.tensor(fields, dtype=torch.int64), sides)


def is_centred(weight: QuantisedWeight) -> bool:
    """Whether every minimum is 8 steps below 0."""
    return weight.minimums is not None and torch.equal(weight.minimums.float(), -MIDDLE * weight.scales.float())


def panels_of(weight: QuantisedWeight, minimums: bool) -> Tensor:
    """Bytes [panels, groups, …] of a weight: each group's levels, scales and, where they are asked for, minimums."""
    (n, d), group = weight.shape, weight.group
    levels = F.pad(weight.levels().view(torch.uint8), (0, -d % group, 0, -n % LANES))
    panels, groups = levels.shape[0] // LANES, levels.shape[1] // group
    if weight.bits == 8:
        units = levels.view(panels, LANES, groups, group // 4, 4).permute(0, 2, 3, 1, 4)
    else:
        halves = levels.view(panels, LANES, groups, group // 8, 2, 4).permute(4, 0, 2, 3, 1, 5)
        units = halves[0] | halves[1] << 4
    parts = [units.reshape(panels, groups, -1)]
    own = [weight.scales]
    if minimums:
        own.append(torch.zeros_like(weight.scales) if weight.minimums is None else weight.minimums)
    for numbers in own:
        lanes = F.pad(numbers, (0, 0, 0, -n % LANES)).view(panels, LANES, groups).transpose(1, 2)
        parts.append(lanes.contiguous().view(torch.uint8))
    return torch.cat(parts, dim=2)


def rows_of(name: str, weight: Weight, place: Callable[[Tensor], Tensor] = resident) -> ScreenedRows:
    """A weight row after row, in memory for weights, or where else `place` puts its tensors.

    Raises ValueError where it is quantised to other than 8 bits, or has a compensation.
    """
    if isinstance(weight, Tensor):
        return ScreenedRows(place(weight))
    if weight.bits != 8 or weight.compensation is not None:
        rank = f" with a compensation of rank {weight.rank}" if weight.rank else ""
        raise ValueError(f"{name} is quantised to {weight.bits} bits{rank}; rows read one by one may have 8 alone")
    numbers = [weight.scales] if weight.minimums is None else [weight.scales, weight.minimums]
    kept = tuple(map(place, numbers))
    addresses = [*(each.data_ptr() for each in kept), 0]
    return ScreenedRows(place(weight.values), torch.tensor([weight.group, *addresses[:2]], dtype=torch.int64), kept)


def bank_rows(name: str, weight: Weight) -> ScreenedRows:
    """The same of a bank, whose rows are read where they lie: they are in such memory already, and not held twice."""
    return rows_of(name, weight, Tensor.contiguous)
