"""A mixture of experts: two grouped GEMMs over tokens sorted by expert.

Nothing waits for the device: tiles find their expert from offsets that stay there, and the grid is the most that any
routing needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import activate
from dsc_kernels.gpu.compiler import Meta, check, kernel, power_of_2, stages
from dsc_kernels.gpu.route_experts import sort_by_expert
from dsc_kernels.weights import Activation

SMALL_TILE = 16
LARGE_TILE = 64


@kernel
def multiply_experts(
    x: tl.tensor,
    weight: tl.tensor,
    gate: tl.tensor,
    scales: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    k: tl.constexpr,
    experts: tl.constexpr,
    experts_width: tl.constexpr,
    inner: tl.constexpr,
    outer: tl.constexpr,
    first: tl.constexpr,
    activation: tl.constexpr,
    rows_per_block: tl.constexpr,
    columns_per_block: tl.constexpr,
    inner_per_step: tl.constexpr,
) -> None:
    """One tile of act(x W_gᵀ) ⊙ x Wᵀ, or act(x Wᵀ) without a gate, times the row's scale: grid (row tiles, columns).

    The first product takes x's rows by token and leaves them sorted by expert; the second takes those and leaves its
    rows where `order` says: slot j of token b is row b · k + j.
    """
    expert = tl.arange(0, experts_width)
    begin = tl.load(offsets + expert, mask=expert < experts, other=0)
    end = tl.load(offsets + expert + 1, mask=expert < experts, other=0)
    tiles = (end - begin + rows_per_block - 1) // rows_per_block
    tiles_until = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    mine = tl.sum((tiles_until <= tile).to(tl.int32), 0)
    if mine >= experts:
        return
    here = expert == mine
    row = tl.sum(tl.where(here, begin + (tile - tiles_until + tiles) * rows_per_block, 0), 0)
    row += tl.arange(0, rows_per_block)
    is_row = row < tl.sum(tl.where(here, end, 0), 0)
    slot = tl.load(order + row, mask=is_row, other=0)
    source = slot // k if first else row
    target = row if first else slot
    column = tl.program_id(1) * columns_per_block + tl.arange(0, columns_per_block)
    is_column = column < outer
    step = tl.arange(0, inner_per_step)
    x_rows = x + source.to(tl.int64)[:, None] * inner + step[None, :]
    at = (mine.to(tl.int64) * outer + column)[None, :] * inner + step[:, None]
    sums = tl.zeros((rows_per_block, columns_per_block), tl.float32)
    gate_sums = tl.zeros((rows_per_block, columns_per_block), tl.float32)
    for start in range(0, inner, inner_per_step):
        inside = start + step < inner
        x_tile = tl.load(x_rows + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        is_weight = is_column[None, :] & inside[:, None]
        weight_tile = tl.load(weight + at + start, mask=is_weight, other=0.0)
        sums = tl.dot(x_tile, weight_tile, sums, input_precision="ieee")
        if gate is not None:
            gate_tile = tl.load(gate + at + start, mask=is_weight, other=0.0)
            gate_sums = tl.dot(x_tile, gate_tile, gate_sums, input_precision="ieee")
    sums = activate(sums, activation) if gate is None else activate(gate_sums, activation) * sums
    if scales is not None:
        sums *= tl.load(scales + slot, mask=is_row, other=0.0)[:, None]
    out_rows = out + target.to(tl.int64)[:, None] * outer + column[None, :]
    tl.store(out_rows, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def blocks(rows: int, experts: int, dtype: torch.dtype) -> Meta:
    """Tile sizes: small ones until an expert has a large tile's rows."""
    wide = 1 if dtype == torch.float32 else 2
    tile = LARGE_TILE if rows >= LARGE_TILE * experts else SMALL_TILE
    return {
        "experts": experts,
        "experts_width": power_of_2(experts),
        "rows_per_block": tile,
        "columns_per_block": 64 if tile == LARGE_TILE else 32,
        "inner_per_step": 32 * wide,
        "num_warps": 4,
        "num_stages": stages(3),
    }


def expert_slots(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """weights_j · W_2 act(W_1 x) of each token's experts j: float32 [B, k, d].

    x [B, d]; weights float32 and experts int32 [B, k]; up and gate [N, hidden, d], down [N, d, hidden] in x's dtype.
    Activations between the products are rounded to x's dtype. A width that is a multiple of 16 loads fastest.
    """
    (batch, d), k = x.shape, experts.shape[1]
    count, hidden, _ = up.shape
    check("x", x, (batch, d))
    check("weights", weights, (batch, k), torch.float32)
    check("experts", experts, (batch, k), torch.int32)
    check("up", up, (count, hidden, d), x.dtype)
    check("down", down, (count, d, hidden), x.dtype)
    if gate is not None:
        check("gate", gate, (count, hidden, d), x.dtype)
        gate = gate.contiguous()
    rows = batch * k
    slots = torch.empty(batch, k, d, dtype=torch.float32, device=x.device)
    if not batch:
        return slots
    order, offsets = sort_by_expert(experts, count)
    middle = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    meta = blocks(rows, count, x.dtype)
    row_tiles = rows // meta["rows_per_block"] + min(count, rows)
    first = {"k": k, "inner": d, "outer": hidden, "first": True, "activation": activation}
    multiply_experts[(row_tiles, triton.cdiv(hidden, meta["columns_per_block"]))](
        *(x.contiguous(), up.contiguous(), gate, None, order, offsets, middle),
        **meta,
        **first,
    )
    second = {"k": k, "inner": hidden, "outer": d, "first": False, "activation": "none"}
    multiply_experts[(row_tiles, triton.cdiv(d, meta["columns_per_block"]))](
        *(middle, down.contiguous(), None, weights.contiguous(), order, offsets, slots),
        **meta,
        **second,
    )
    return slots
