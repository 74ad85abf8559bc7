"""The first half of a composition for few tokens and a large width: x · u_j, spread over rows and stretches of d."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2


@kernel
def contract_rows(
    x: tl.tensor,
    u: tl.tensor,
    picks: tl.tensor,
    coefficients: tl.tensor,
    latent: tl.tensor,
    k: tl.constexpr,
    rank: tl.constexpr,
    d: tl.constexpr,
    rows_per_block: tl.constexpr,
    d_per_block: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """Some rows of one token over one stretch of d: grid (batch, ⌈k · rank / rows⌉, ⌈d / d per block⌉)."""
    follow(chained)
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * rows_per_block + tl.arange(0, rows_per_block)
    column = tl.program_id(2) * d_per_block + tl.arange(0, d_per_block)
    is_row, inside = place < k * rank, column < d
    atom = tl.load(picks + token * k + place // rank, mask=is_row, other=0)
    weight = tl.load(coefficients + token * k + place // rank, mask=is_row, other=0.0)
    rows = (atom.to(tl.int64) * rank + place % rank) * d
    x_part = tl.load(x + token * d + column, mask=inside, other=0.0).to(tl.float32)
    u_part = tl.load(u + rows[:, None] + column[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
    sums = tl.sum(u_part.to(tl.float32) * x_part[None, :], 1) * weight
    stretch = token * tl.num_programs(2) + tl.program_id(2)
    tl.store(latent + stretch * (k * rank) + place, sums, mask=is_row)


def blocks(k: int, rank: int, d: int) -> Meta:
    """Small tiles: with one token they alone must occupy the GPU."""
    tiles = {"rows_per_block": 4 if k * rank >= 4 else power_of_2(k * rank), "d_per_block": min(power_of_2(d), 1024)}
    return {"k": k, "rank": rank, "d": d, **tiles, "num_warps": 2}


def contract(x: Tensor, u: Tensor, picks: Tensor, coefficients: Tensor, rank: int = 0) -> Tensor:
    """Terms of (x · u_j) ẑ_j, float32 [B, stretches of d, K · max(rank, 1)]: `expand.expand` sums them over stretches.

    x [B, d]; u [atoms · max(rank, 1), d]; picks int32 and coefficients float32 [B, K], as `select.select` returns them.
    """
    (batch, d), k, rank = x.shape, picks.shape[1], max(rank, 1)
    check("x", x, (batch, d))
    check("u", u, (u.shape[0], d))
    check("picks", picks, (batch, k), torch.int32)
    check("coefficients", coefficients, (batch, k), torch.float32)
    meta = blocks(k, rank, d)
    stretches = triton.cdiv(d, meta["d_per_block"])
    latent = torch.empty(batch, stretches, k * rank, dtype=torch.float32, device=x.device)
    if batch:
        contract_rows[(batch, triton.cdiv(k * rank, meta["rows_per_block"]), stretches)](
            *(t.contiguous() for t in (x, u, picks, coefficients)), latent, **meta, **chain()
        )
    return latent
