"""Quantised weights of any kind, and how far a product with rounded inputs may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.quantised import ActivationBits, Bits, QuantisedWeight

INPUT_GROUP = 32
STEPS: dict[ActivationBits, int] = {8: 127, 16: 127 * 254}  # from 0 to a group's largest
ACTIVATION_BITS: tuple[ActivationBits, ...] = (8, 16)


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
    activation_bits: ActivationBits = 16,
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
    shape = (rows, columns)
    return QuantisedWeight(values, scales, minimums, bits, group, shape, compensation, dtype, activation_bits)


def steps_of(x: Tensor, bits: ActivationBits) -> Tensor:
    """What 1 is worth in the integers that kernels make of inputs [T, d], per input, in float64."""
    d = x.shape[1]
    wide = torch.nn.functional.pad(x.double(), (0, -d % INPUT_GROUP)).view(
        x.shape[0], -(-d // INPUT_GROUP), INPUT_GROUP
    )
    return (wide.abs().amax(dim=2) / STEPS[bits]).repeat_interleave(INPUT_GROUP, dim=1)[:, :d]


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
    # float32's x / step is off by some thousandths where there are 16 bits of it
    half = 0.5 + (1e-5 if weight.activation_bits == 8 else 1e-2)
    return steps_of(x, weight.activation_bits) @ levels.T * half + rounding + 1e-30


def exact(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """x Wᵀ with the compensation, in float64."""
    return x.double() @ weight.whole(torch.float64).T


def emulated(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """The same as kernels compute it, number by number: inputs rounded to int8, integer products, in float64."""
    steps = steps_of(x, 8)
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
    ratio = x.double() / steps_of(x, 8).clamp_min(1e-300)
    return ((ratio - ratio.floor() - 0.5).abs() >= within).all(dim=1)
