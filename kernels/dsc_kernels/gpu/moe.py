"""A mixture of experts: two grouped GEMMs over tokens sorted by expert, and a shared expert's beside them.

Nothing waits for the device: tiles find their expert there, and the grid is the most that any routing needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import activate, follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2, stages
from dsc_kernels.gpu.place_slots import sort_by_expert
from dsc_kernels.launch_time import found_by_tiles
from dsc_kernels.weights import Activation, MlpWeights

SMALL_TILE = 16
LARGE_TILE = 64
DIRECT_SLOTS, DIRECT_TOKENS = 512, 256  # up to which a tile may find its rows by itself


class SharedBeside(NamedTuple):
    """A shared expert: whole weights [H, d] and [d, H] without biases, and its outputs' weights float32 [B], if any."""

    mlp: MlpWeights
    weights: Tensor | None


@kernel
def expert_tile(
    x: tl.tensor,
    weight: tl.tensor,
    gate: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    is_row: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    scaled_by: tl.tensor,
    first_weight_row: tl.tensor,
    column: tl.tensor,
    inner: tl.constexpr,
    outer: tl.constexpr,
    activation: tl.constexpr,
    rows_per_block: tl.constexpr,
    columns_per_block: tl.constexpr,
    inner_per_step: tl.constexpr,
) -> None:
    """act(x W_gᵀ) ⊙ x Wᵀ, or act(x Wᵀ) without a gate, of rows `source` of x to rows `target` of out."""
    is_column = column < outer
    step = tl.arange(0, inner_per_step)
    x_rows = x + source.to(tl.int64)[:, None] * inner + step[None, :]
    at = (first_weight_row + column)[None, :] * inner + step[:, None]
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
        sums *= tl.load(scales + scaled_by, mask=is_row, other=0.0)[:, None]
    out_rows = out + target.to(tl.int64)[:, None] * outer + column[None, :]
    tl.store(out_rows, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@kernel
def rows_of_tile(
    picks: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    tile: tl.tensor,
    batch: tl.tensor,
    k: tl.constexpr,
    k_width: tl.constexpr,
    batch_width: tl.constexpr,
    experts: tl.constexpr,
    experts_width: tl.constexpr,
    rows_per_block: tl.constexpr,
) -> tl.tensor:
    """The expert of a tile, or more than there are, and of its rows: which are any, their slots, and their places.

    Sorted slots are read; of few tokens each tile counts the picks, and then finds the tokens that have its expert.
    """
    expert = tl.arange(0, experts_width)
    if order is None:
        token, pick = tl.arange(0, batch_width), tl.arange(0, k_width)
        is_pick = (token < batch)[:, None] & (pick < k)[None, :]
        picked = tl.load(picks + token[:, None] * k + pick[None, :], mask=is_pick, other=experts)
        counts = tl.histogram(tl.reshape(picked, (batch_width * k_width,)), experts_width)
        tiles = tl.where(expert < experts, (counts + rows_per_block - 1) // rows_per_block, 0)
    else:
        begin = tl.load(offsets + expert, mask=expert < experts, other=0)
        end = tl.load(offsets + expert + 1, mask=expert < experts, other=0)
        tiles = (end - begin + rows_per_block - 1) // rows_per_block
    tiles_until = tl.cumsum(tiles, 0)
    mine = tl.sum(((tiles_until <= tile) & (expert < experts)).to(tl.int32), 0)
    here = expert == mine
    place = (tile - tl.sum(tl.where(here, tiles_until - tiles, 0), 0)) * rows_per_block + tl.arange(0, rows_per_block)
    if order is None:
        has = tl.sum((picked == mine).to(tl.int32), 1)
        slot_of_token = token * k + tl.sum(tl.where(picked == mine, pick[None, :], 0), 1)
        placed = (has > 0)[None, :] & ((tl.cumsum(has, 0) - has)[None, :] == place[:, None])
        is_row = place < tl.sum(has, 0)
        slot = tl.sum(tl.where(placed, slot_of_token[None, :], 0), 1)
        row = slot
    else:
        row = place + tl.sum(tl.where(here, begin, 0), 0)
        is_row = row < tl.sum(tl.where(here, end, 0), 0)
        slot = tl.load(order + row, mask=is_row, other=0)
    return mine, is_row, slot, row


@kernel
def multiply_experts(
    x: tl.tensor,
    weight: tl.tensor,
    gate: tl.tensor,
    scales: tl.tensor,
    picks: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    shared_x: tl.tensor,
    shared_weight: tl.tensor,
    shared_gate: tl.tensor,
    shared_scales: tl.tensor,
    shared_out: tl.tensor,
    batch: tl.tensor,
    row_tiles: tl.tensor,
    k: tl.constexpr,
    k_width: tl.constexpr,
    batch_width: tl.constexpr,
    outputs_per_token: tl.constexpr,
    experts: tl.constexpr,
    experts_width: tl.constexpr,
    inner: tl.constexpr,
    outer: tl.constexpr,
    shared_inner: tl.constexpr,
    shared_outer: tl.constexpr,
    first: tl.constexpr,
    activation: tl.constexpr,
    rows_per_block: tl.constexpr,
    shared_rows_per_block: tl.constexpr,
    columns_per_block: tl.constexpr,
    inner_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One tile of an expert's product, or behind those of the shared expert's: grid (tiles of both,).

    The first product takes x's rows by token and leaves them where the second finds them, sorted by expert or by slot;
    the second leaves its rows by slot: pick j of token b is row b · outputs_per_token + j, the shared expert's behind.
    """
    follow(chained)
    program = tl.program_id(0)
    columns: tl.constexpr = (outer + columns_per_block - 1) // columns_per_block
    if program < row_tiles * columns:
        mine, is_row, slot, row = rows_of_tile(
            picks,
            order,
            offsets,
            program % row_tiles,
            batch,
            k,
            k_width,
            batch_width,
            experts,
            experts_width,
            rows_per_block,
        )
        if mine < experts:
            source = slot // k if first else row
            target = row if first else slot + slot // k * (outputs_per_token - k)
            expert_tile(
                x,
                weight,
                gate,
                scales,
                out,
                is_row,
                source,
                target,
                slot,
                mine.to(tl.int64) * outer,
                program // row_tiles * columns_per_block + tl.arange(0, columns_per_block),
                inner,
                outer,
                activation,
                rows_per_block,
                columns_per_block,
                inner_per_step,
            )
    if shared_weight is not None:  # noqa: SIM102  this is decided when the kernel is compiled
        if program >= row_tiles * columns:
            own = program - row_tiles * columns
            token_tiles = (batch + shared_rows_per_block - 1) // shared_rows_per_block
            token = own % token_tiles * shared_rows_per_block + tl.arange(0, shared_rows_per_block)
            target = token if first else token * outputs_per_token + k
            expert_tile(
                shared_x,
                shared_weight,
                shared_gate,
                shared_scales,
                shared_out,
                token < batch,
                token,
                target,
                token,
                tl.cast(0, tl.int64),
                own // token_tiles * columns_per_block + tl.arange(0, columns_per_block),
                shared_inner,
                shared_outer,
                activation,
                shared_rows_per_block,
                columns_per_block,
                inner_per_step,
            )


def direct(batch: int, k: int, experts: int, hidden: int, d: int) -> bool:
    """Whether tiles find their rows by themselves: where that takes less time than the launch of a sort."""
    if batch > DIRECT_TOKENS or batch * k > DIRECT_SLOTS:
        return False
    width = tile_sizes(batch, k, experts)[1]
    return found_by_tiles(experts, batch, k, triton.cdiv(hidden, width) + triton.cdiv(d, width))


def tile_sizes(batch: int, k: int, experts: int) -> tuple[int, int]:
    """Rows and columns: small ones until an expert has a large tile's rows."""
    return (LARGE_TILE, 64) if batch * k >= LARGE_TILE * experts else (SMALL_TILE, 32)


def blocks(batch: int, k: int, experts: int, dtype: torch.dtype, sorts: bool) -> Meta:
    """Tile sizes and widths; sorts: whether slots are sorted by expert before."""
    wide = 1 if dtype == torch.float32 else 2
    rows, columns = tile_sizes(batch, k, experts)
    return {
        "k": k,
        "k_width": power_of_2(k),
        "batch_width": 1 if sorts else power_of_2(batch, 16),
        "experts": experts,
        "experts_width": power_of_2(experts + 1, 16),  # one bin is for what no token picks
        "rows_per_block": rows,
        "shared_rows_per_block": power_of_2(min(batch, LARGE_TILE), rows),
        "columns_per_block": columns,
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
    shared: SharedBeside | None = None,
) -> Tensor:
    """weights_j · W_2 act(W_1 x) of each token's experts j: float32 [B, k, d], or [B, k + 1, d] with a shared one.

    x [B, d]; weights float32 and experts int32 [B, k], those of a token all different; up and gate [N, hidden, d], down
    [N, d, hidden] in x's dtype; the shared expert has a gate where the others have. Activations between the products
    are rounded to x's dtype. A width that is a multiple of 16 loads fastest.
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
    per_token = k if shared is None else k + 1
    slots = torch.empty(batch, per_token, d, dtype=torch.float32, device=x.device)
    if not batch:
        return slots
    x, experts = x.contiguous(), experts.contiguous()
    sorts = not direct(batch, k, count, hidden, d)
    order, offsets = sort_by_expert(experts, count) if sorts else (None, None)
    middle = torch.empty(batch * k, hidden, dtype=x.dtype, device=x.device)
    meta = {**blocks(batch, k, count, x.dtype, sorts), "outputs_per_token": per_token}
    row_tiles = batch * k // meta["rows_per_block"] + min(count, batch * k)
    token_tiles = triton.cdiv(batch, meta["shared_rows_per_block"])
    ups: tuple[Tensor | None, ...] = (None,) * 5
    downs, width = ups, 0
    if shared is not None:
        own = shared.mlp
        assert isinstance(own.up, Tensor) and isinstance(own.down, Tensor)
        width = own.up.shape[0]
        check("shared up", own.up, (width, d), x.dtype)
        check("shared down", own.down, (d, width), x.dtype)
        shared_gate = own.gate
        if gate is not None:
            assert isinstance(shared_gate, Tensor)
            check("shared gate", shared_gate, (width, d), x.dtype)
        shared_middle = torch.empty(batch, width, dtype=x.dtype, device=x.device)
        ups = x, own.up, shared_gate, None, shared_middle  # type: ignore[assignment]
        downs = shared_middle, own.down, None, shared.weights, slots

    def programs(outer: int, shared_outer: int) -> tuple[int]:
        columns, shared_columns = (triton.cdiv(n, meta["columns_per_block"]) for n in (outer, shared_outer))
        return (row_tiles * columns + (0 if shared is None else token_tiles * shared_columns),)

    found = experts, order, offsets
    multiply_experts[programs(hidden, width)](
        *(x, up.contiguous(), gate, None, *found, middle, *ups, batch, row_tiles),
        **{**meta, "inner": d, "outer": hidden, "shared_inner": d, "shared_outer": width},
        first=True,
        activation=activation,
        **chain(),
    )
    multiply_experts[programs(d, d)](
        *(middle, down.contiguous(), None, weights.contiguous(), *found, slots, *downs, batch, row_tiles),
        **{**meta, "inner": hidden, "outer": d, "shared_inner": width, "shared_outer": d},
        first=False,
        activation="none",
        **chain(),
    )
    return slots
