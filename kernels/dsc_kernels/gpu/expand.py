"""The second half of a composition for few tokens and a large width: Σ c_j v_j, spread over columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2


@kernel
def expand_columns(
    latent: tl.tensor,
    v: tl.tensor,
    picks: tl.tensor,
    gamma: tl.tensor,
    static: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    k: tl.constexpr,
    rank: tl.constexpr,
    d: tl.constexpr,
    width: tl.constexpr,
    stretches: tl.constexpr,
    scalar_gamma: tl.constexpr,
    d_per_block: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """Some columns of one token: grid (batch, ⌈d / d per block⌉)."""
    follow(chained)
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, width)
    column = tl.program_id(1) * d_per_block + tl.arange(0, d_per_block)
    is_row, inside = place < k * rank, column < d
    atom = tl.load(picks + token * k + place // rank, mask=is_row, other=0)
    rows = (atom.to(tl.int64) * rank + place % rank) * d
    v_part = tl.load(v + rows[:, None] + column[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
    sums = tl.zeros((width,), tl.float32)
    for stretch in range(stretches):
        sums += tl.load(latent + (token * stretches + stretch) * (k * rank) + place, mask=is_row, other=0.0)
    scale = tl.load(gamma) if scalar_gamma else tl.load(gamma + column, mask=inside, other=0.0)
    total = tl.sum(v_part.to(tl.float32) * sums[:, None], 0) * scale
    at = token * d + column
    total += tl.load(static + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def blocks(k: int, rank: int, d: int) -> Meta:
    """Narrow tiles: with one token they alone must occupy the GPU; but at least 128 bytes of a row."""
    width = power_of_2(k * rank)
    tiles = {"width": width, "d_per_block": min(power_of_2(d), max(4096 // width, 64))}
    return {"k": k, "rank": rank, "d": d, **tiles, "num_warps": 4 if width >= 8 else 1}


def expand(
    latent: Tensor,
    v: Tensor,
    picks: Tensor,
    gamma: Tensor,
    static: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    rank: int = 0,
) -> Tensor:
    """static + (Σ_j c_j v_j) ⊙ γ + residual, [B, d] in `dtype`, with c summed over `contract.contract`'s stretches.

    v [atoms · max(rank, 1), d]; picks int32 [B, K]; gamma float32 [d] or [1]; static, residual [B, d].
    """
    (batch, d), k, rank = static.shape, picks.shape[1], max(rank, 1)
    stretches = latent.shape[1]
    check("latent", latent, (batch, stretches, k * rank), torch.float32)
    check("v", v, (v.shape[0], d))
    check("picks", picks, (batch, k), torch.int32)
    check("gamma", gamma, (gamma.numel(),), torch.float32)
    if gamma.numel() not in (1, d):
        raise ValueError(f"gamma has {gamma.numel()} values; expected 1 or {d}")
    check("static", static, (batch, d))
    if residual is not None:
        check("residual", residual, (batch, d))
        residual = residual.contiguous()
    out = torch.empty(batch, d, dtype=dtype, device=static.device)
    if batch:
        meta = blocks(k, rank, d)
        expand_columns[(batch, triton.cdiv(d, meta["d_per_block"]))](
            *(t.contiguous() for t in (latent, v, picks, gamma, static)),
            *(residual, out),
            **meta,
            stretches=stretches,
            scalar_gamma=gamma.numel() == 1,
            **chain(),
        )
    return out
