"""Products of weights with a step's tokens, rows of the weight as the wide side: parts of kernels, and their tiles.

On sm_90 the wide side of a tensor core's instruction is 64: with few tokens on that side most of it would be padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, stages

PROGRAMS = 132  # that fill a GPU: the multiprocessors of the largest one that is aimed at
FEW_TOKENS = 64  # with more, a product is bound by arithmetic where weights are large: cuBLAS is better at that
SMALL_WEIGHTS = 1024  # inputs of products that no number of tokens in a graph makes long
MANY_TOKENS = 256  # the largest step that is captured


@kernel
def rows_by_tokens(
    sums: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    x: tl.tensor,
    token: tl.tensor,
    is_token: tl.tensor,
    split: tl.tensor,
    splits: tl.constexpr,
    d: tl.constexpr,
    d_per_step: tl.constexpr,
) -> tl.tensor:
    """sums [rows, tokens] plus W[row] · x[token]ᵀ over one of `splits` stretches of d; row and token are int64."""
    step = tl.arange(0, d_per_step)
    steps: tl.constexpr = (d + d_per_step - 1) // d_per_step
    per_split: tl.constexpr = (steps + splits - 1) // splits * d_per_step
    begin = split * per_split
    rows = weight + row[:, None] * d + step[None, :]
    columns = x + token[None, :] * d + step[:, None]
    for start in range(begin, begin + per_split, d_per_step):
        inside = start + step < d
        rows_tile = tl.load(rows + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        columns_tile = tl.load(columns + start, mask=is_token[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(rows_tile, columns_tile, sums, input_precision="ieee")
    return sums


@kernel
def multiply_rows(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    parts: tl.tensor,
    batch: tl.tensor,
    outputs: tl.tensor,
    d: tl.constexpr,
    splits: tl.constexpr,
    rows_per_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    d_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One tile of parts [splits, batch, outputs]: grid (⌈batch / tokens⌉, ⌈outputs / rows⌉, splits)."""
    follow(chained)
    multiply_tile(
        x,
        weight,
        bias,
        parts,
        batch,
        outputs,
        tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2),
        d,
        splits,
        rows_per_block,
        tokens_per_block,
        d_per_step,
    )


@kernel
def multiply_tile(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    parts: tl.tensor,
    batch: tl.tensor,
    outputs: tl.tensor,
    token_tile: tl.tensor,
    row_tile: tl.tensor,
    split: tl.tensor,
    d: tl.constexpr,
    splits: tl.constexpr,
    rows_per_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    d_per_step: tl.constexpr,
) -> None:
    """Rows of W [outputs, d] times tokens over one stretch of d, the bias with the first."""
    token = (token_tile * tokens_per_block + tl.arange(0, tokens_per_block)).to(tl.int64)
    row = (row_tile * rows_per_block + tl.arange(0, rows_per_block)).to(tl.int64)
    is_token, is_row = token < batch, row < outputs
    sums = tl.zeros((rows_per_block, tokens_per_block), tl.float32)
    sums = rows_by_tokens(sums, weight, row, is_row, x, token, is_token, split, splits, d, d_per_step)
    if bias is not None:
        added = tl.load(bias + row, mask=is_row & (split == 0), other=0.0).to(tl.float32)
        sums += added[:, None]
    out = parts + (split * batch + token)[None, :] * outputs + row[:, None]
    tl.store(out, sums.to(parts.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


def fused(tokens: int, d: int) -> bool:
    """Whether products of so many tokens with weights of d inputs are ours: where a launch costs more than they do."""
    return tokens <= (MANY_TOKENS if d <= SMALL_WEIGHTS else FEW_TOKENS)


def tiles(tokens: int, rows: int, dtype: torch.dtype) -> Meta:
    """Tile sizes of a product of so many tokens with so many rows: the most rows that still fill a GPU."""
    wide = 1 if dtype == torch.float32 else 2
    if tokens > FEW_TOKENS:
        shape = {"rows_per_block": 64 * wide, "tokens_per_block": 64 * wide, "d_per_step": 32 * wide}
        return {**shape, "num_warps": 4 * wide, "num_stages": stages(3)}
    height = 64
    while height > 16 and rows < height * PROGRAMS and tokens <= 16:
        height //= 2
    tokens_per_block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    shape = {"rows_per_block": height, "tokens_per_block": tokens_per_block}
    step = 64 if tokens <= 32 else 32
    return {**shape, "d_per_step": step * wide, "num_warps": 4, "num_stages": stages(4 if tokens <= 32 else 3)}


def split_count(tokens: int, rows: int, d: int, meta: Meta) -> int:
    """Into how many stretches of d a product is split: as many as fill a GPU, each with several steps; at most 8."""
    programs = triton.cdiv(rows, meta["rows_per_block"]) * triton.cdiv(tokens, meta["tokens_per_block"])
    steps = triton.cdiv(d, meta["d_per_step"])
    splits = 1
    while splits < 8 and programs * splits * 2 <= PROGRAMS * 3 // 2 and steps >= splits * 8:
        splits *= 2
    return splits


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias in parts whose sum it is: x [B, d], weight [n, d] → float32 [parts, B, n]."""
    (batch, d), n = x.shape, weight.shape[0]
    check("x", x, (batch, d), weight.dtype)
    check("weight", weight, (n, d))
    meta = tiles(batch, n, weight.dtype)
    splits = split_count(batch, n, d, meta)
    parts = torch.empty(splits, batch, n, dtype=torch.float32, device=x.device)
    if batch:
        grid = (triton.cdiv(batch, meta["tokens_per_block"]), triton.cdiv(n, meta["rows_per_block"]), splits)
        multiply_rows[grid](x.contiguous(), weight, bias, parts, batch, n, d=d, splits=splits, **meta, **chain())
    return parts
