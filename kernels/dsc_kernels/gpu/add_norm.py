"""The sum of a residual stream with what a branch gave, and the norm of it: all between two branches in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2
from dsc_kernels.weights import NormWeights


class Parts(NamedTuple):
    """What a branch gave, [B, d], as terms to be added: number i of a token's begins at i · part + token · `token`."""

    terms: Tensor  # float32, or the layer's dtype
    number: int
    part_stride: int
    token_stride: int
    further: Tensor | None = None  # [B, d]: one more

    @property
    def shape(self) -> tuple[int, int]:
        d = self.terms.shape[-1]
        return self.terms.numel() // (self.number * d), d

    @classmethod
    def of(cls, terms: Tensor) -> Parts:
        """Terms [number, B, d]."""
        return cls(terms, terms.shape[0], terms.shape[1] * terms.shape[2], terms.shape[2])


@kernel
def add_norm_row(
    residual: tl.tensor,
    terms: tl.tensor,
    further: tl.tensor,
    total_out: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed_out: tl.tensor,
    rstd_out: tl.tensor,
    length_out: tl.tensor,
    part_stride: tl.tensor,
    token_stride: tl.tensor,
    norm_eps: tl.tensor,
    rstd_eps: tl.tensor,
    token: tl.tensor,
    writes: tl.tensor,
    count: tl.constexpr,
    d: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """The normed sum [width] of one token in float32, rounded as it is stored; see `add_norm`.

    writes: whether the sum and its norm are stored, where several programs compute them; None: they are.
    """
    column = tl.arange(0, width)
    inside = column < d
    stored = inside
    if writes is not None:
        stored = inside & writes
    at = token * d + column
    total = tl.zeros((width,), tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(count):
        own = terms + i * part_stride.to(tl.int64) + token * token_stride
        total += tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
    if further is not None:
        total += tl.load(further + at, mask=inside, other=0.0).to(tl.float32)
    if total_out is not None:
        rounded = total.to(total_out.dtype.element_ty)
        tl.store(total_out + at, rounded, mask=stored)
        total = rounded.to(tl.float32)
    if weight is not None:
        if bias is not None:
            total -= tl.sum(total, 0) / d
        square = tl.sum(tl.where(inside, total * total, 0.0), 0)
        total *= 1.0 / tl.sqrt(square / d + norm_eps)
        total *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(normed_out.dtype.element_ty)
        tl.store(normed_out + at, rounded, mask=stored)
        total = rounded.to(tl.float32)
    if length_out is not None:
        tl.store(length_out + token, tl.sqrt(tl.sum(tl.where(inside, total * total, 0.0), 0)))
    if rstd_out is not None:
        moved = tl.where(inside, total - tl.sum(total, 0) / d, 0.0)
        tl.store(rstd_out + token, 1.0 / tl.sqrt(tl.sum(moved * moved, 0) / d + rstd_eps))
    return total


@kernel
def add_norm_rows(
    residual: tl.tensor,
    terms: tl.tensor,
    further: tl.tensor,
    total_out: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed_out: tl.tensor,
    rstd_out: tl.tensor,
    length_out: tl.tensor,
    part_stride: tl.tensor,
    token_stride: tl.tensor,
    norm_eps: tl.tensor,
    rstd_eps: tl.tensor,
    count: tl.constexpr,
    d: tl.constexpr,
    width: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One token: grid (batch,)."""
    follow(chained)
    add_norm_row(
        residual,
        terms,
        further,
        total_out,
        weight,
        bias,
        normed_out,
        rstd_out,
        length_out,
        part_stride,
        token_stride,
        norm_eps,
        rstd_eps,
        tl.program_id(0).to(tl.int64),
        None,
        count,
        d,
        width,
    )


def blocks(d: int) -> Meta:
    """Vector width, and warps: about 16 numbers a lane."""
    width = power_of_2(d)
    return {"d": d, "width": width, "num_warps": min(max(width // 512, 1), 8)}


class Normed(NamedTuple):
    """The stream x [B, d], and what its norm gives; of that, for a router, 1 / standard deviation and the 2-norm,
    float32 [B]."""

    x: Tensor
    normed: Tensor
    rstd: Tensor | None
    length: Tensor | None = None


class Moments(NamedTuple):
    """Of rows, float32 [B]: 1 / standard deviation, and the 2-norm; None: not asked for."""

    rstd: Tensor | None = None
    length: Tensor | None = None


def summed(residual: Tensor | None, parts: Parts, dtype: torch.dtype) -> Tensor:
    """residual [B, d] and all of `parts`, in `dtype`."""
    total = torch.empty(*parts.shape, dtype=dtype, device=parts.terms.device)
    launch(residual, parts, total, None, None, Moments(), 0.0)
    return total


def room_for(rows: Tensor, rstd: bool, length: bool) -> Moments:
    """Of as many rows as these."""
    batch, device = rows.shape[0], rows.device
    return Moments(*(torch.empty(batch, dtype=torch.float32, device=device) if one else None for one in (rstd, length)))


def moments_of(x: Tensor, eps: float | None, length: bool) -> Moments:
    """Those of the rows of x [B, d] that are asked for: 1 / standard deviation with an eps, and ‖x‖."""
    moments = room_for(x, eps is not None, length)
    if eps is not None or length:
        launch(x, None, None, None, None, moments, eps or 0.0)
    return moments


def rstd_of(x: Tensor, eps: float) -> Tensor:
    """1 / standard deviation of each row of x [B, d]: float32 [B]."""
    rstd = moments_of(x, eps, False).rstd
    assert rstd is not None
    return rstd


def add_norm(
    residual: Tensor, parts: Parts | None, norm: NormWeights, rstd_eps: float | None, length: bool = False
) -> Normed:
    """x = residual + parts, rounded to residual's dtype, and the norm of that.

    rstd_eps: where given, what is normed is normed once more by a router: its 1 / standard deviation is given, too.
    length: whether ‖what is normed‖ is.
    """
    batch, d = residual.shape
    check("residual", residual, (batch, d))
    x = residual if parts is None else torch.empty(batch, d, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(batch, d, dtype=residual.dtype, device=residual.device)
    moments = room_for(residual, rstd_eps is not None, length)
    launch(residual, parts, None if parts is None else x, norm, normed, moments, rstd_eps or 0.0)
    return Normed(x, normed, *moments)


def launch(
    residual: Tensor | None,
    parts: Parts | None,
    total: Tensor | None,
    norm: NormWeights | None,
    normed: Tensor | None,
    moments: Moments,
    rstd_eps: float,
) -> None:
    first = next(tensor for tensor in (residual, total, normed) if tensor is not None)
    batch, d = first.shape
    terms, count, part_stride, token_stride, further = parts or (None, 0, 0, 0, None)
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    if batch:
        add_norm_rows[(batch,)](
            *(residual, terms, further, total, weight, bias, normed, *moments),
            *(part_stride, token_stride, eps, rstd_eps),
            count=count,
            **blocks(d),
            **chain(),
        )
