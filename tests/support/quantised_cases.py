"""Quantised weights of any kind, and how far a product with inputs in int8 may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.quantised import Bits, QuantisedWeight

INPUT_GROUP = 32


def quantised(
    g: torch.Generator,
    rows: int,
    columns: int,
    bits: Bits = 4,
    group: int = 32,
    kind: str = "minimums",
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    size: float = 1.0,
) -> QuantisedWeight:
    """Random levels of all values; kind: "minimums", "centred" (8 steps below 0) or "none"."""
    groups = -(-columns // group)
    if bits == 8:
        values = torch.randint(-128, 128, (rows, columns), generator=g, dtype=torch.int8)
    else:
        values = torch.randint(0, 256, (rows, -(-columns // 2)), generator=g, dtype=torch.uint8)
    step = size / (columns**0.5 * (70 if bits == 8 else 4.6))
    scales = (step * (0.5 + torch.rand(rows, groups, generator=g))).half()
    minimums = None
    if kind == "minimums":
        minimums = (scales.float() * (4 * torch.rand(rows, groups, generator=g) - (9 if bits == 4 else 2))).half()
    if kind == "centred":
        minimums = (-8 * scales.float()).half()
    compensation = None
    if rank:
        left = torch.randn(rows, rank, generator=g) * rank**-0.5
        compensation = left.to(dtype), (torch.randn(rank, columns, generator=g) * columns**-0.5).to(dtype)
    return QuantisedWeight(values, scales, minimums, bits, group, (rows, columns), compensation, dtype)


def steps_of(x: Tensor) -> Tensor:
    """What 1 is worth in the int8 that kernels make of inputs [T, d], per input, in float64."""
    d = x.shape[1]
    wide = torch.nn.functional.pad(x.double(), (0, -d % INPUT_GROUP)).view(
        x.shape[0], -(-d // INPUT_GROUP), INPUT_GROUP
    )
    return (wide.abs().amax(dim=2) / 127).repeat_interleave(INPUT_GROUP, dim=1)[:, :d]


def bound(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """How far products [T, n] may be from the exact ones: half a step of each input, and float32's rounding."""
    w = weight.whole(torch.float64).abs()
    levels = weight.dequantise(torch.float64).abs()
    # sums of levels and of minimums by themselves, which may cancel
    size = weight.scales.double().abs().repeat_interleave(weight.group, 1)[:, : weight.shape[1]] * 128
    narrow = 2.0**-8 if weight.dtype == torch.bfloat16 and weight.rank else 0  # of what is between the two sides
    rounding = x.double().abs() @ (levels + size + w).T * 3e-6
    if weight.compensation is not None:
        left, right = (side.double().abs() for side in weight.compensation)
        rounding = rounding + (x.double().abs() @ right.T) @ left.T * (narrow + 3e-6)
    return steps_of(x) @ levels.T / 2 * (1 + 1e-5) + rounding + 1e-30


def exact(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """x Wᵀ with the compensation, in float64."""
    return x.double() @ weight.whole(torch.float64).T


def emulated(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """The same as kernels compute it, number by number: inputs rounded to int8, integer products, in float64."""
    steps = steps_of(x)
    rounded = torch.where(steps > 0, x.double() / steps.clamp_min(1e-300), 0.0).round() * steps
    y = rounded @ weight.dequantise(torch.float64).T
    if weight.compensation is not None:
        left, right = (side.double() for side in weight.compensation)
        y = y + (x.double() @ right.T) @ left.T
    return y


def clear_of_ties(x: Tensor, within: float = 1e-4) -> Tensor:
    """Of inputs [T, d], the tokens none of whose lies so near the middle of two steps that kernels may round it apart.

    within: of a step; bool [T].
    """
    ratio = x.double() / steps_of(x).clamp_min(1e-300)
    return ((ratio - ratio.floor() - 0.5).abs() >= within).all(dim=1)
