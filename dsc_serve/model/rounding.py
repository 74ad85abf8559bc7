"""Rounding weights to 4 and 8 bits in groups, each group by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.quantised import Bits, QuantisedWeight
from dsc_serve.model.quantised_tensor import packed

GROUP = 32
LARGEST = {8: 127, 4: 15}
WIDEST: dict[Bits, float] = {8: 127 * 65504.0, 4: 65504.0}  # numbers that a scale, or a minimum, in float16 reaches
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the range of a group, what its 16 levels may be spread over
STEP = 1 << 20  # numbers at a time


class OutOfRangeError(ValueError):
    """A weight whose scales float16 does not hold."""


def rounded(weight: Tensor, bits: Bits, dtype: torch.dtype = torch.float32, group: int = GROUP) -> QuantisedWeight:
    """A weight [out, in] to the nearest levels of its groups; dtype: of the layer. Raises OutOfRangeError.

    In 8 bits levels reach from −127 to 127 times a scale. In 4 there are 16 from a minimum on, spread over as much of
    the group's range as gives the least squared error.
    """
    check_range(weight, bits)
    rows, columns = weight.shape
    groups = -(-columns // group)
    values = torch.empty(
        rows, columns if bits == 8 else -(-columns // 2), dtype=torch.int8 if bits == 8 else torch.uint8
    )
    scales = torch.empty(rows, groups, dtype=torch.float16)
    minimums = torch.empty_like(scales) if bits == 4 else None
    step = max(1, STEP // columns)
    for start in range(0, rows, step):
        own = slice(start, start + step)
        parts = grouped(weight[own].float(), group)
        scale, minimum = grids(parts, bits)
        levels = levels_of(parts, scale, minimum, bits).flatten(1)[:, :columns]
        values[own], scales[own] = packed(levels, bits), scale
        if minimums is not None:
            minimums[own] = minimum
    return QuantisedWeight(values, scales, minimums, bits, group, (rows, columns), None, dtype)


def check_range(weight: Tensor, bits: Bits) -> None:
    """Raises OutOfRangeError where float16 does not hold the scales of a weight, or it is not finite."""
    largest = float(weight.abs().max())
    if not largest <= WIDEST[bits]:
        raise OutOfRangeError(f"its largest number is {largest:.3g}")


def grouped(weight: Tensor, group: int) -> Tensor:
    """[rows, groups, group]; the last group of a row ends with its last number where it has fewer."""
    missing = -weight.shape[1] % group
    if missing:
        weight = torch.cat((weight, weight[:, -1:].expand(-1, missing)), dim=1)
    return weight.reshape(weight.shape[0], -1, group)


def grids(parts: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Scales and minimums float16 [rows, groups] for numbers [rows, groups, group]; in 8 bits the minimums are 0."""
    if bits == 8:
        scale = (parts.abs().amax(2) / LARGEST[8]).half()
        return scale, torch.zeros_like(scale)
    low, high = parts.aminmax(dim=2)
    best = [torch.full_like(low, torch.inf), low.half(), low.half()]
    for share in SHRUNK:
        scale, minimum = ((high - low) * (share / LARGEST[4])).half(), (low + (high - low) * ((1 - share) / 2)).half()
        for refit in (False, True):
            if refit:
                scale, minimum = fitted(parts, levels_of(parts, scale, minimum, bits).float())
            error = (value_of(levels_of(parts, scale, minimum, bits), scale, minimum) - parts).square_().sum(2)
            better = error < best[0]
            best = [torch.where(better, new, old) for new, old in zip((error, scale, minimum), best, strict=True)]
    return best[1], best[2]


def fitted(parts: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minimums float16 of least squared error for these levels."""
    mean, middle = levels.mean(2, keepdim=True), parts.mean(2, keepdim=True)
    spread = (levels - mean).square().sum(2)
    slope = ((levels - mean) * (parts - middle)).sum(2) / spread.clamp_min(1e-12)
    return slope.half(), (middle[..., 0] - slope.half().float() * mean[..., 0]).half()


def levels_of(parts: Tensor, scale: Tensor, minimum: Tensor, bits: Bits) -> Tensor:
    """The nearest levels, int8 or, of 4 bits, uint8."""
    wide = scale.float()[..., None]
    q = ((parts - minimum.float()[..., None]) / torch.where(wide == 0, 1.0, wide)).round_()
    low = -LARGEST[8] if bits == 8 else 0
    return q.clamp_(low, LARGEST[bits]).to(torch.int8 if bits == 8 else torch.uint8)


def value_of(levels: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return levels.float().mul_(scale.float()[..., None]).add_(minimum.float()[..., None])
