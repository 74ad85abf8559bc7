"""Router logits: a GEMM that folds LayerNorm in, truncates, and leaves the maxima that selection starts from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import clamp
from dsc_kernels.gpu.compiler import Meta, check, kernel, stages

GROUP = 16
SMALL_BATCH = 64


@kernel
def route(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    logits: tl.tensor,
    maxima: tl.tensor,
    batch: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    tau: tl.tensor,
    norm_eps: tl.tensor,
    d: tl.constexpr,
    normed: tl.constexpr,
    tokens_per_block: tl.constexpr,
    atoms_per_block: tl.constexpr,
    d_per_step: tl.constexpr,
    group: tl.constexpr,
) -> None:
    """One tile of logits: grid (⌈batch / tokens⌉, ⌈atoms / atoms per block⌉)."""
    token = (tl.program_id(0) * tokens_per_block + tl.arange(0, tokens_per_block)).to(tl.int64)
    atom = tl.program_id(1) * atoms_per_block + tl.arange(0, atoms_per_block)
    step = tl.arange(0, d_per_step)
    is_token, is_atom = token < batch, atom < atoms
    x_rows = x + token[:, None] * d + step[None, :]
    weight_columns = weight + atom.to(tl.int64)[None, :] * d + step[:, None]
    sums = tl.zeros((tokens_per_block, atoms_per_block), tl.float32)
    if normed:
        # Moments about the row's first value: about 0 the variance would cancel where the mean is large
        shift = tl.load(x + token * d, mask=is_token, other=0.0).to(tl.float32)
        first = tl.zeros((tokens_per_block,), tl.float32)
        second = tl.zeros((tokens_per_block,), tl.float32)
    for start in range(0, d, d_per_step):
        inside = start + step < d
        x_tile = tl.load(x_rows + start, mask=is_token[:, None] & inside[None, :], other=0.0)
        weight_tile = tl.load(weight_columns + start, mask=is_atom[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(x_tile.to(weight.dtype.element_ty), weight_tile, sums, input_precision="ieee")
        if normed:
            moved = tl.where(inside[None, :], x_tile.to(tl.float32) - shift[:, None], 0.0)
            first += tl.sum(moved, 1)
            second += tl.sum(moved * moved, 1)
    if normed:
        mean = first / d
        variance = second / d - mean * mean
        variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays NaN, which tl.maximum turns into 0 on a GPU
        sums *= (1.0 / tl.sqrt(variance + norm_eps))[:, None]
    if bias is not None:
        sums += tl.load(bias + atom, mask=is_atom, other=0.0)[None, :]
    values = clamp(sums, tau)
    out = logits + token[:, None] * groups * group + atom[None, :]
    tl.store(out, values, mask=is_token[:, None] & (atom < groups * group)[None, :])
    known = tl.where(is_atom[None, :] & (values == values), values, float("-inf"))
    best = tl.max(tl.reshape(known, (tokens_per_block, atoms_per_block // group, group)), 2)
    at = tl.program_id(1) * (atoms_per_block // group) + tl.arange(0, atoms_per_block // group)
    is_group = is_token[:, None] & (at < groups)[None, :]
    tl.store(maxima + token[:, None] * groups + at[None, :], best, mask=is_group)


def blocks(batch: int, atoms: int, dtype: torch.dtype) -> Meta:
    """Tile sizes: for small batches narrow tiles, so that reading the router's rows fills the GPU."""
    wide = 1 if dtype == torch.float32 else 2
    if batch <= SMALL_BATCH:
        atoms_per_block = 16 if atoms <= 4096 else 32
        tiles = {"tokens_per_block": 16, "atoms_per_block": atoms_per_block, "d_per_step": 64 * wide}
    else:
        tiles = {"tokens_per_block": 64, "atoms_per_block": 64, "d_per_step": 32 * wide}
    return {**tiles, "group": GROUP, "num_warps": 4, "num_stages": stages(3)}


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, tau: float, norm_eps: float | None
) -> tuple[Tensor, Tensor]:
    """Truncated logits float32 [B, M], a view of rows of ⌈M/16⌉ · 16, and the maxima [B, ⌈M/16⌉] of each 16 of them.

    x [B, d], weight [M, d], bias float32 [M]. With norm_eps the weight is a folded one (`reference.fold_router_norm`):
    clamp(rstd(x) · x W″ᵀ + b′, −τ, τ). A NaN stays NaN among the logits and counts as −∞ in the maxima.
    x is rounded to the weight's dtype for the product, not for the norm.
    """
    batch, d = x.shape
    atoms = weight.shape[0]
    check("x", x, (batch, d))
    check("weight", weight, (atoms, d))
    if bias is not None:
        check("bias", bias, (atoms,), torch.float32)
        bias = bias.contiguous()
    groups = triton.cdiv(atoms, GROUP)
    # Rows of whole groups: then each is aligned, and wide loads read it and wide stores write it
    logits = torch.empty(batch, groups * GROUP, dtype=torch.float32, device=x.device)[:, :atoms]
    maxima = torch.empty(batch, groups, dtype=torch.float32, device=x.device)
    if batch:
        meta = blocks(batch, atoms, weight.dtype)
        grid = (triton.cdiv(batch, meta["tokens_per_block"]), triton.cdiv(atoms, meta["atoms_per_block"]))
        route[grid](
            *(x.contiguous(), weight.contiguous(), bias, logits, maxima, batch, atoms, groups, tau, norm_eps or 0.0),
            d=d,
            normed=norm_eps is not None,
            **meta,
        )
    return logits, maxima
