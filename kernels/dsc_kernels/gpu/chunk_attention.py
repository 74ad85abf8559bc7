"""Attention of all chunks of prompts of a step, each token up to itself, over paged keys and values: one launch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.chunks import PlacedChunks
from dsc_kernels.gpu.arithmetic import bounded, follow
from dsc_kernels.gpu.attention import INTEGERS, LOG2_E
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, on_amd, power_of_2, stages
from dsc_kernels.weights import WHOLE, ChunkPlace, KvCache, Scope

QUERIES_PER_BLOCK = 64  # rows of a tile: tokens times the query heads that share a key
FIELDS = 4  # of a tile, and of a chunk's place
TILES_PER_PROGRAM = 128  # of a plan


class ChunkTiles(NamedTuple):
    """The tiles that chunks are cut into, on the device: int32 [tiles, FIELDS].

    Of each the row of the tables, the first row of queries, how many tokens, and the first one's position. A tile of
    no tokens is no work.
    """

    work: Tensor
    tokens: int  # of a tile, at most


@kernel
def plan_tiles(
    places: tl.tensor,
    work: tl.tensor,
    chunks: tl.constexpr,
    width: tl.constexpr,
    tiles: tl.constexpr,
    tokens_per_block: tl.constexpr,
    tiles_per_block: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """The tiles of all chunks, and behind them such as have no tokens: grid (⌈tiles / tiles per block⌉,)."""
    follow(chained)
    tile = tl.program_id(0) * tiles_per_block + tl.arange(0, tiles_per_block)
    chunk = tl.arange(0, width)
    length = tl.load(places + chunk * 4 + 2, mask=chunk < chunks, other=0).to(tl.int32)
    count = (length + tokens_per_block - 1) // tokens_per_block
    end = tl.cumsum(count, 0)
    own = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), 1)
    found = own < chunks
    mine = chunk[None, :] == own[:, None]
    first_tile = tl.sum(tl.where(mine, (end - count)[None, :], 0), 1)
    at = tl.where(found, (tile - first_tile) * tokens_per_block, 0)
    row = tl.load(places + own * 4, mask=found, other=0).to(tl.int32)
    start = tl.load(places + own * 4 + 1, mask=found, other=0).to(tl.int32)
    whole = tl.load(places + own * 4 + 2, mask=found, other=0).to(tl.int32)
    context = tl.load(places + own * 4 + 3, mask=found, other=0).to(tl.int32)
    inside = tile < tiles
    tl.store(work + tile * 4, row, mask=inside)
    tl.store(work + tile * 4 + 1, start + at, mask=inside)
    tl.store(work + tile * 4 + 2, tl.minimum(whole - at, tokens_per_block), mask=inside)
    tl.store(work + tile * 4 + 3, context - whole + at, mask=inside)


@kernel
def attend_tile(
    best: tl.tensor,
    weight_sums: tl.tensor,
    sums: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    position_of_row: tl.tensor,
    kv_head: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    size: tl.constexpr,
    size_width: tl.constexpr,
    block: tl.constexpr,
    positions_per_step: tl.constexpr,
    capped: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """The running maxima, sums of weights and sums after the positions begin … end − 1.

    Not masked: every row sees all of them.
    """
    column, offset = tl.arange(0, size_width), tl.arange(0, positions_per_step)
    is_column = column < size
    for start in range(begin, end, positions_per_step):
        position = start + offset
        inside = position < end
        where = tl.load(table + position // block, mask=inside, other=0).to(tl.int64)
        row = ((where * kv_heads + kv_head) * block + position % block) * size
        key = tl.load(keys + row[None, :] + column[:, None], mask=inside[None, :] & is_column[:, None], other=0.0)
        value = tl.load(values + row[:, None] + column[None, :], mask=inside[:, None] & is_column[None, :], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if capped:
            scores = bounded(scores, cap)
        if masked:
            seen = (position[None, :] <= position_of_row[:, None]) & inside[None, :]
            if window > 0:
                seen = seen & (position[None, :] > position_of_row[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)  # of a row that has seen nothing yet
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(best - anchor)
        if masked:
            # A value that is not a number spoils the rows that see it, and those alone: 0 times it were NaN, too
            wide = value.to(tl.float32)
            spoilt = tl.sum(tl.where(wide - wide == 0.0, 0, 1), 1) > 0
            value = tl.where(spoilt[:, None], 0.0, wide).to(value.dtype)
            weights = tl.where(seen & spoilt[None, :], float("nan"), weights)
        weight_sums = weight_sums * shrink + tl.sum(weights, 1)
        if masked:
            weights = tl.where(spoilt[None, :], 0.0, weights)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
        best = new_best
    return best, weight_sums, sums


@kernel
def attend_chunks(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    work: tl.tensor,
    out: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    group: tl.constexpr,
    group_width: tl.constexpr,
    tokens_per_block: tl.constexpr,
    size: tl.constexpr,
    size_width: tl.constexpr,
    block: tl.constexpr,
    positions_per_step: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """The query heads of one key-value head of a tile of tokens: grid (tiles, kv heads). `scale` is in base 2."""
    follow(chained)
    mine, kv_head = work + tl.program_id(0) * 4, tl.program_id(1)
    table = tables + tl.load(mine).to(tl.int64) * table_stride
    first_row, tokens, first = tl.load(mine + 1).to(tl.int64), tl.load(mine + 2), tl.load(mine + 3)
    row, column = tl.arange(0, tokens_per_block * group_width), tl.arange(0, size_width)
    token, member = row // group_width, row % group_width
    is_row = (token < tokens) & (member < group)
    inside = is_row[:, None] & (column < size)[None, :]
    head = kv_head * group + member
    query_at = q + (first_row + token)[:, None] * q_stride + head[:, None] * size + column[None, :]
    query = tl.load(query_at, mask=inside, other=0.0)
    position = first + token
    best = tl.full((tokens_per_block * group_width,), float("-inf"), tl.float32)
    weight_sums = tl.zeros((tokens_per_block * group_width,), tl.float32)
    sums = tl.zeros((tokens_per_block * group_width, size_width), tl.float32)
    begin = 0
    clear = first // positions_per_step * positions_per_step  # up to here every row sees every position
    if windowed:
        begin = tl.maximum(first - window + 1, 0)
        clear = begin
    if not windowed:
        best, weight_sums, sums = attend_tile(
            best,
            weight_sums,
            sums,
            query,
            keys,
            values,
            table,
            begin,
            clear,
            position,
            kv_head,
            kv_heads,
            scale,
            cap,
            window,
            size,
            size_width,
            block,
            positions_per_step,
            capped,
            False,
        )
    best, weight_sums, sums = attend_tile(
        best,
        weight_sums,
        sums,
        query,
        keys,
        values,
        table,
        clear,
        first + tokens,
        position,
        kv_head,
        kv_heads,
        scale,
        cap,
        window,
        size,
        size_width,
        block,
        positions_per_step,
        capped,
        True,
    )
    sums = sums / tl.where(weight_sums == 0.0, 1.0, weight_sums)[:, None]
    row_out = ((first_row + token) * kv_heads + kv_head) * group + member
    tl.store(out + row_out[:, None] * size + column[None, :], sums.to(out.dtype.element_ty), mask=inside)


def blocks(group: int, size: int, block: int, dtype: torch.dtype, scope: Scope = WHOLE) -> Meta:
    """Tile sizes: 64 rows, the least that sm_90's tensor cores take at once; more of large groups.

    On AMD's GPUs more than 16 positions at a time would spill registers.
    """
    width, group_width = power_of_2(size, 16), power_of_2(group)
    positions = 64 if width * dtype.itemsize <= 128 else 32 if width * dtype.itemsize <= 512 else 16
    positions = 16 if on_amd() else positions
    tiles = {"group": group, "group_width": group_width, "tokens_per_block": max(QUERIES_PER_BLOCK // group_width, 1)}
    rest = {"size": size, "size_width": width, "block": block, "positions_per_step": positions}
    flags = {"capped": scope.cap > 0, "windowed": scope.window > 0}
    return {**tiles, **rest, **flags, "num_warps": 4, "num_stages": stages(3)}


def cut(chunks: Iterable[ChunkPlace], group: int, device: torch.device) -> ChunkTiles:
    """Chunks, each the row of its table, its first token, how many and the context after them, in tiles on a device."""
    tokens = max(QUERIES_PER_BLOCK // power_of_2(group), 1)
    rows = [
        (row, start + at, min(tokens, length - at), context - length + at)
        for row, start, length, context in chunks
        for at in range(0, length, tokens)
    ]
    work = torch.tensor(rows, dtype=torch.int32).view(-1, FIELDS)
    if device.type != "cpu":
        work = work.pin_memory().to(device, non_blocking=True)
    return ChunkTiles(work, tokens)


def plan_meta(chunks: int, tokens: int, group: int) -> Meta:
    """Sizes of a plan: tiles for so many chunks that have together up to so many tokens."""
    tile = max(QUERIES_PER_BLOCK // power_of_2(group), 1)
    sizes = {"tiles": tokens // tile + chunks, "tokens_per_block": tile, "tiles_per_block": TILES_PER_PROGRAM}
    return {"chunks": chunks, "width": power_of_2(chunks), **sizes, "num_warps": 4}


def tiles_of(chunks: Iterable[ChunkPlace], group: int, device: torch.device) -> ChunkTiles:
    """Chunks in tiles: cut where it is known what they are."""
    if not isinstance(chunks, PlacedChunks):
        return cut(chunks, group, device)
    places = chunks.places
    count = places.shape[0]
    check("places", places, (count, FIELDS), INTEGERS)
    meta = plan_meta(count, chunks.tokens, group)
    work = torch.empty(meta["tiles"], FIELDS, dtype=torch.int32, device=device)
    plan_tiles[(triton.cdiv(meta["tiles"], meta["tiles_per_block"]),)](places, work, **meta, **chain())
    return ChunkTiles(work, meta["tokens_per_block"])


def chunk_attention(
    q: Tensor, cache: KvCache, tables: Tensor, tiles: ChunkTiles, out: Tensor, scale: float, scope: Scope = WHOLE
) -> None:
    """Attention of the tokens of tiles, each over what it sees of its sequence up to itself, written to their rows.

    q, out [T, heads, size] (rows of q may be strided), of which tiles name some; the cache has their dtype; tables
    [S, W] int32 or int64.
    """
    keys, values = cache
    total, heads, size = q.shape
    pool, kv_heads, block, _ = keys.shape
    check("q", q, (total, heads, size))
    check("keys", keys, (pool, kv_heads, block, size), q.dtype)
    check("values", values, (pool, kv_heads, block, size), q.dtype)
    check("tables", tables, (tables.shape[0], tables.shape[1]), INTEGERS)
    check("out", out, (total, heads, size), q.dtype)
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    if not all(part.is_contiguous() for part in (keys, values, out)):
        raise ValueError("keys, values and out must be contiguous")
    if q.stride(2) != 1 or q.stride(1) != size:
        q = q.contiguous()
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    if not len(tiles.work):
        return
    meta = blocks(heads // kv_heads, size, block, q.dtype, scope)
    if meta["tokens_per_block"] != tiles.tokens:
        raise ValueError(f"tiles are of {tiles.tokens} tokens; with these heads {meta['tokens_per_block']}")
    attend_chunks[(len(tiles.work), kv_heads)](
        *(q, keys, values, tables, tiles.work, out),
        *(q.stride(0), tables.stride(0), kv_heads, scale * LOG2_E, scope.cap * LOG2_E, scope.window),
        **meta,
        **chain(),
    )
