"""Queries, keys and values of a step's tokens: their product, the turning of heads and the writing of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2
from dsc_kernels.gpu.product import rows_by_tokens, tiles
from dsc_kernels.weights import KvCache, QkNorm, Slots


@kernel
def split_halves(sums: tl.tensor, half: tl.constexpr, tokens: tl.constexpr) -> tl.tensor:
    """The first and the second `half` rows of sums [2 · half, tokens]."""
    return tl.split(tl.permute(tl.reshape(sums, (2, half, tokens)), (1, 2, 0)))


@kernel
def project_heads(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    cos_sin: tl.tensor,
    positions: tl.tensor,
    slot_blocks: tl.tensor,
    slot_offsets: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    batch: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
    d: tl.constexpr,
    rows_per_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    d_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """Rows of one head, as many of its first half as of its second: grid (⌈batch / tokens⌉, heads · size / rows)."""
    follow(chained)
    half: tl.constexpr = rows_per_block // 2
    per_head: tl.constexpr = size // rows_per_block
    head, part = tl.program_id(1) // per_head, tl.program_id(1) % per_head
    token = (tl.program_id(0) * tokens_per_block + tl.arange(0, tokens_per_block)).to(tl.int64)
    is_token = token < batch
    place = tl.arange(0, rows_per_block)
    row = (head * size + (place // half) * (size // 2) + part * half + place % half).to(tl.int64)
    sums = tl.zeros((rows_per_block, tokens_per_block), tl.float32)
    every = place < rows_per_block
    sums = rows_by_tokens(sums, weight, row, every, x, token, is_token, 0, 1, d, d_per_step)
    if bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[:, None]
    first, second = split_halves(sums, half, tokens_per_block)
    column = part * half + tl.arange(0, half)
    inside = is_token[None, :] & (column < size)[:, None]
    if cos_sin is not None:
        position = tl.load(positions + token, mask=is_token, other=0).to(tl.int64)
        turned = inside & (head < heads + kv_heads)
        angle = position[None, :] * size + column[:, None]
        cos = tl.load(cos_sin + angle, mask=turned, other=1.0)
        sin = tl.load(cos_sin + angle + size // 2, mask=turned, other=0.0)
        moved = first * cos - second * sin
        second = second * cos + first * sin
        first = moved
    if head < heads:
        at = (token * heads + head) * size
        tl.store(q + at[None, :] + column[:, None], first.to(q.dtype.element_ty), mask=inside)
        tl.store(q + at[None, :] + column[:, None] + size // 2, second.to(q.dtype.element_ty), mask=inside)
    else:
        where = tl.load(slot_blocks + token, mask=is_token, other=0).to(tl.int64)
        offset = tl.load(slot_offsets + token, mask=is_token, other=0).to(tl.int64)
        own = (head - heads) % kv_heads
        at = ((where * kv_heads + own) * block + offset) * size
        if head < heads + kv_heads:
            tl.store(keys + at[None, :] + column[:, None], first.to(keys.dtype.element_ty), mask=inside)
            tl.store(keys + at[None, :] + column[:, None] + size // 2, second.to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(values + at[None, :] + column[:, None], first.to(values.dtype.element_ty), mask=inside)
            tl.store(
                values + at[None, :] + column[:, None] + size // 2, second.to(values.dtype.element_ty), mask=inside
            )


@kernel
def put_heads(
    part: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    rows: tl.tensor,
    qkv: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    cache_rows: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    changed: tl.constexpr,
) -> None:
    """Some columns of heads [heads, columns]: queries back to where they were, if changed, the others to the cache."""
    is_query, is_key = head < heads, (head >= heads) & (head < heads + kv_heads)
    is_value = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    stored = part.to(keys.dtype.element_ty)
    if changed:
        tl.store(qkv + rows[:, None] + column[None, :], stored, mask=is_query[:, None] & inside[None, :])
    at = cache_rows[:, None] + column[None, :]
    tl.store(keys + at, stored, mask=is_key[:, None] & inside[None, :])
    tl.store(values + at, stored, mask=is_value[:, None] & inside[None, :])


@kernel
def norm_heads(
    part: tl.tensor,
    scale: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
) -> tl.tensor:
    """Some columns of queries and keys times their scale and the norm's weight; values as they are."""
    weight = tl.load(key_norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if query_norm is not None:
        of_query = tl.load(query_norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight = tl.where((head < heads)[:, None], of_query, weight)
    return tl.where((head < heads + kv_heads)[:, None], part * scale[:, None] * weight, part)


@kernel
def prepare_heads(
    qkv: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    cos_sin: tl.tensor,
    positions: tl.tensor,
    slot_blocks: tl.tensor,
    slot_offsets: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    norm_eps: tl.tensor,
    size: tl.constexpr,
    half_width: tl.constexpr,
    rest_width: tl.constexpr,
    turned: tl.constexpr,
    block: tl.constexpr,
    heads_per_block: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """Heads of one token, normed, turned and, but for queries, written to the cache: grid (tokens, blocks of heads).

    A head is read as the two halves of what is turned, so that lanes hold what they turn, and the rest behind them.
    """
    follow(chained)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_per_block + tl.arange(0, heads_per_block)
    is_head = head < heads + 2 * kv_heads
    rows = (token * (heads + 2 * kv_heads) + head) * size
    where, offset = tl.load(slot_blocks + token).to(tl.int64), tl.load(slot_offsets + token)
    cache_rows = ((where * kv_heads + tl.where(head < heads, 0, (head - heads) % kv_heads)) * block + offset) * size
    half: tl.constexpr = turned // 2
    column, behind = tl.arange(0, half_width), turned + tl.arange(0, rest_width)
    is_half, is_rest = column < half, behind < size
    squares = tl.zeros((heads_per_block,), tl.float32)
    if turned > 0:
        at, mask = qkv + rows[:, None] + column[None, :], is_head[:, None] & is_half[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if turned < size:
        mask = is_head[:, None] & is_rest[None, :]
        rest = tl.load(qkv + rows[:, None] + behind[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)
    scale = squares
    if key_norm is not None:
        scale = 1.0 / tl.sqrt(squares / size + norm_eps)
    tl.debug_barrier()  # queries go back to where they have been read from
    if turned > 0:
        if key_norm is not None:
            first = norm_heads(first, scale, query_norm, key_norm, column, is_half, head, heads, kv_heads)
            second = norm_heads(second, scale, query_norm, key_norm, column + half, is_half, head, heads, kv_heads)
        angle = tl.load(positions + token).to(tl.int64) * turned + column
        cos = tl.load(cos_sin + angle, mask=is_half, other=1.0)[None, :]
        sin = tl.load(cos_sin + angle + half, mask=is_half, other=0.0)[None, :]
        turns = (head < heads + kv_heads)[:, None]
        moved = tl.where(turns, first * cos - second * sin, first)
        second = tl.where(turns, second * cos + first * sin, second)
        put_heads(moved, column, is_half, rows, qkv, keys, values, cache_rows, head, heads, kv_heads, True)
        put_heads(second, column + half, is_half, rows, qkv, keys, values, cache_rows, head, heads, kv_heads, True)
    if turned < size:
        changed: tl.constexpr = key_norm is not None
        if changed:
            rest = norm_heads(rest, scale, query_norm, key_norm, behind, is_rest, head, heads, kv_heads)
        put_heads(rest, behind, is_rest, rows, qkv, keys, values, cache_rows, head, heads, kv_heads, changed)


def head_tiles(tokens: int, rows: int, size: int, dtype: torch.dtype) -> Meta:
    """Those of a product, its rows within one head."""
    meta = tiles(tokens, rows, dtype)
    return {**meta, "rows_per_block": min(meta["rows_per_block"], size)}


def projects(size: int, cos_sin: Tensor | None) -> bool:
    """Whether `project` serves heads of this size: they are turned whole, or not at all."""
    turned = size if cos_sin is None else 2 * cos_sin.shape[2]
    return size >= 16 and size == power_of_2(size) and turned == size


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, cos_sin: Tensor | None, slots: Slots, cache: KvCache
) -> Tensor:
    """Queries [T, heads, size], turned, of x [T, d]; keys, turned, and values are written to the cache.

    weight [(heads + 2 · kv heads) · size, d]; cos_sin float32 [positions, 2, size / 2], None: nothing is turned.
    """
    (tokens, d), (_, kv_heads, block, size) = x.shape, cache.keys.shape
    rows = (heads + 2 * kv_heads) * size
    check("x", x, (tokens, d), weight.dtype)
    check("weight", weight, (rows, d))
    q = torch.empty(tokens, heads, size, dtype=x.dtype, device=x.device)
    if tokens:
        meta = head_tiles(tokens, rows, size, weight.dtype)
        grid = (triton.cdiv(tokens, meta["tokens_per_block"]), rows // meta["rows_per_block"])
        project_heads[grid](
            *(x.contiguous(), weight, bias, cos_sin, *slots, q, cache.keys, cache.values),
            *(tokens, heads, kv_heads),
            size=size,
            block=block,
            d=d,
            **meta,
            **chain(),
        )
    return q


def prepare_blocks(size: int, block: int, turned: int) -> Meta:
    """Vector widths of a head's parts, and so many heads that a lane reads 16 bytes of one."""
    widths = {"half_width": power_of_2(turned // 2), "rest_width": power_of_2(size - turned)}
    part = max(turned // 2, size - turned)
    per_block = max(256 // power_of_2(part), 1)
    return {"size": size, **widths, "block": block, "turned": turned, "heads_per_block": per_block, "num_warps": 1}


def store_kv(
    qkv: Tensor, heads: int, cos_sin: Tensor | None, slots: Slots, cache: KvCache, qk_norm: QkNorm | None = None
) -> None:
    """As `backend.Backend` says, of heads that are normed each by itself: qkv [T, heads + 2 · kv heads, size]."""
    tokens, all_heads, size = qkv.shape
    _, kv_heads, block, _ = cache.keys.shape
    check("qkv", qkv, (tokens, heads + 2 * kv_heads, size), cache.keys.dtype)
    turned = 0 if cos_sin is None else 2 * cos_sin.shape[2]
    query_norm, key_norm, eps = (None, None, 0.0) if qk_norm is None else (qk_norm.query, qk_norm.key, qk_norm.eps)
    if tokens:
        meta = prepare_blocks(size, block, turned)
        prepare_heads[(tokens, triton.cdiv(all_heads, meta["heads_per_block"]))](
            *(qkv, query_norm, key_norm, cos_sin, *slots, cache.keys, cache.values),
            *(heads, kv_heads, eps),
            **meta,
            **chain(),
        )
