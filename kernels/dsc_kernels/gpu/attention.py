"""Attention of one new token per sequence over its paged keys and values.

Ours because no library on a package index serves: flash-attn and flashinfer need nvcc, or prebuilt wheels tied to one
version of torch and CUDA, and vLLM's kernels come only with vLLM. It takes the engine's pools and tables as they are.

Contexts are split by their lengths, once for all layers of a step (`plan_splits`): so one long context among short ones
is shared by the whole GPU. The parts are merged by their running maxima and sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import bounded, follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2, stages
from dsc_kernels.weights import WHOLE, KvCache, Scope

LOG2_E = 1.4426950408889634
INTEGERS = (torch.int32, torch.int64)  # of tables and contexts
SPLIT_UNIT = 256  # positions: splits are multiples of it
ENOUGH_PROGRAMS = 264
PARTS_PER_STEP = 16  # that are merged at a time


class Splits(NamedTuple):
    """How a step's contexts are split: sequence s has the splits starts[s] … starts[s + 1] − 1, each of `length`."""

    plan: Tensor  # int32 [S + 2]: starts [S + 1], and behind them the length
    most: int  # splits that there may be
    window: int


@kernel
def plan_splits(
    contexts: tl.tensor,
    plan: tl.tensor,
    sequences: tl.tensor,
    most: tl.tensor,
    window: tl.tensor,
    width: tl.constexpr,
    unit: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """The splits of all sequences: grid (1,)."""
    follow(chained)
    sequence = tl.arange(0, width)
    context = tl.load(contexts + sequence, mask=sequence < sequences, other=0).to(tl.int32)
    context = tl.where(window > 0, tl.minimum(context, window), context)
    total = tl.sum(tl.where(sequence < sequences, tl.maximum((context + unit - 1) // unit, 1), 0), 0)
    room = most - sequences  # each sequence but for rounding up
    length = tl.where(total <= most, 1, (total + room - 1) // room) * unit
    # An empty context has a split, too: it writes the zeros
    splits = tl.where(sequence < sequences, tl.maximum((context + length - 1) // length, 1), 0)
    ends = tl.cumsum(splits, 0)
    tl.store(plan + sequence, ends - splits, mask=sequence <= sequences)
    tl.store(plan + sequences, tl.sum(splits, 0))
    tl.store(plan + sequences + 1, length)


@kernel
def attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    plan: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    stats: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    sequences: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    sequences_width: tl.constexpr,
    group: tl.constexpr,
    group_width: tl.constexpr,
    size: tl.constexpr,
    size_width: tl.constexpr,
    block: tl.constexpr,
    positions_per_step: tl.constexpr,
    capped: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """The query heads of one key-value head over one split of a context: grid (splits, kv heads).

    `scale` is in base 2. Of a sequence with several splits, parts [splits, H, size] holds sums that are not divided
    yet, and stats [splits, H, 2] the maximum and the sum of weights of each; the others are done.
    """
    follow(chained)
    split, kv_head = tl.program_id(0), tl.program_id(1)
    every = tl.arange(0, sequences_width)
    starts = tl.load(plan + every, mask=every <= sequences, other=0x7FFFFFFF)
    sequence = tl.sum((starts <= split).to(tl.int32), 0) - 1
    if sequence >= sequences:
        return
    first_split, next_split = tl.load(plan + sequence), tl.load(plan + sequence + 1)
    length = tl.load(plan + sequences + 1)
    sequence = sequence.to(tl.int64)
    context = tl.load(contexts + sequence).to(tl.int32)
    seen_from = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    begin = seen_from + (split - first_split) * length
    end = tl.minimum(begin + length, context)
    member, column, offset = tl.arange(0, group_width), tl.arange(0, size_width), tl.arange(0, positions_per_step)
    head = kv_head * group + member
    is_head, is_column = member < group, column < size
    mine = is_head[:, None] & is_column[None, :]
    query = tl.load(q + sequence * q_stride + head[:, None] * size + column[None, :], mask=mine, other=0.0)
    best = tl.full((group_width,), float("-inf"), tl.float32)
    weight_sums = tl.zeros((group_width,), tl.float32)
    sums = tl.zeros((group_width, size_width), tl.float32)
    for start in range(begin, end, positions_per_step):
        position = start + offset
        seen = position < end
        where = tl.load(tables + sequence * table_stride + position // block, mask=seen, other=0).to(tl.int64)
        row = ((where * kv_heads + kv_head) * block + position % block) * size
        key = tl.load(keys + row[None, :] + column[:, None], mask=seen[None, :] & is_column[:, None], other=0.0)
        value = tl.load(values + row[:, None] + column[None, :], mask=seen[:, None] & is_column[None, :], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if capped:
            scores = bounded(scores, cap)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        weight_sums = weight_sums * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
        best = new_best
    if next_split - first_split == 1:
        sums = sums / tl.where(weight_sums == 0.0, 1.0, weight_sums)[:, None]
        row_out = sequence * kv_heads * group + head
        tl.store(out + row_out[:, None] * size + column[None, :], sums.to(out.dtype.element_ty), mask=mine)
    else:
        at = split.to(tl.int64) * kv_heads * group + head
        tl.store(stats + at * 2, best, mask=is_head)
        tl.store(stats + at * 2 + 1, weight_sums, mask=is_head)
        tl.store(parts + at[:, None] * size + column[None, :], sums, mask=mine)


@kernel
def merge_splits(
    parts: tl.tensor,
    stats: tl.tensor,
    plan: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    size: tl.constexpr,
    size_width: tl.constexpr,
    parts_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One head of one sequence from its splits, where it has several: grid (sequences, heads)."""
    follow(chained)
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(plan + sequence), tl.load(plan + sequence + 1)
    if end - begin == 1:
        return
    part, column = tl.arange(0, parts_per_step), tl.arange(0, size_width)
    best = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((size_width,), tl.float32)
    for start in range(begin, end, parts_per_step):
        at = (start + part).to(tl.int64) * heads + head
        is_part = start + part < end
        own_best = tl.load(stats + at * 2, mask=is_part, other=float("-inf"))
        own_sums = tl.load(stats + at * 2 + 1, mask=is_part, other=0.0)
        new_best = tl.maximum(best, tl.max(own_best, 0))
        share = tl.where(is_part, tl.exp2(own_best - new_best), 0.0)
        shrink = tl.exp2(best - new_best)
        inside = is_part[:, None] & (column < size)[None, :]
        own = tl.load(parts + at[:, None] * size + column[None, :], mask=inside, other=0.0)
        sums = sums * shrink + tl.sum(own * share[:, None], 0)
        total = total * shrink + tl.sum(own_sums * share, 0)
        best = new_best
    row = sequence.to(tl.int64) * heads + head
    tl.store(out + row * size + column, (sums / total).to(out.dtype.element_ty), mask=column < size)


def most_splits(sequences: int, kv_heads: int, max_context_len: int) -> int:
    """Splits that a step may have: those that fill a GPU, and one for each sequence besides."""
    needed = sequences * -(-max_context_len // SPLIT_UNIT)
    return max(min(sequences + ENOUGH_PROGRAMS // kv_heads, needed), sequences + 1)


def split_contexts(contexts: Tensor, kv_heads: int, max_context_len: int, window: int = 0) -> Splits:
    """The splits of contexts [S], at most `max_context_len`, of which the last `window` are seen (0: all)."""
    (sequences,) = contexts.shape
    most = most_splits(sequences, kv_heads, max_context_len)
    plan = torch.empty(sequences + 2, dtype=torch.int32, device=contexts.device)
    plan_splits[(1,)](contexts, plan, sequences, most, window, **plan_blocks(sequences), **chain())
    return Splits(plan, most, window)


def plan_blocks(sequences: int) -> Meta:
    """Vector width of the plan: with one lane behind the last sequence."""
    return {"width": power_of_2(sequences + 1, 512), "unit": SPLIT_UNIT, "num_warps": 4}


def blocks(group: int, size: int, block: int, sequences: int, dtype: torch.dtype, capped: bool = False) -> Meta:
    """Tile sizes: tensor cores want 16 rows, so small groups are padded; reading the context is what takes time.

    Keys and values of several steps are on their way while one is computed with.
    """
    width = power_of_2(size, 16)
    positions = min(64, max(16, 16384 // (width * dtype.itemsize)))
    tiles = {"group": group, "group_width": power_of_2(group, 16), "size": size, "size_width": width}
    rest = {"block": block, "positions_per_step": positions, "sequences_width": power_of_2(sequences + 1, 512)}
    return {**tiles, **rest, "capped": capped, "num_warps": 4, "num_stages": stages(5)}


def merge_blocks(size: int) -> Meta:
    """Tile sizes of the merge."""
    return {"size": size, "size_width": power_of_2(size), "parts_per_step": PARTS_PER_STEP, "num_warps": 1}


def decode_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """softmax(q Kᵀ · scale) V over what `scope` lets of the first `contexts` positions be seen: [S, heads, size].

    q [S, heads, size] (rows may be strided); the cache has q's dtype; tables [S, W] and contexts [S] int32 or int64,
    contexts at most `max_context_len`. An empty context gives zeros.
    """
    (sequences, heads, size), kv_heads = q.shape, cache.keys.shape[1]
    check("contexts", contexts, (sequences,), INTEGERS)
    out = torch.empty(sequences, heads, size, dtype=q.dtype, device=q.device)
    if sequences:
        splits = split_contexts(contexts, kv_heads, max_context_len, scope.window)
        attend_into(out, q, cache, tables, contexts, splits, scale, scope)
    return out


def attend_into(
    out: Tensor,
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    splits: Splits,
    scale: float,
    scope: Scope = WHOLE,
) -> None:
    """The same to out [S, heads, size], with the splits of these contexts and this window."""
    keys, values = cache
    sequences, heads, size = q.shape
    pool, kv_heads, block, _ = keys.shape
    check("q", q, (sequences, heads, size))
    check("out", out, (sequences, heads, size), q.dtype)
    check("keys", keys, (pool, kv_heads, block, size), q.dtype)
    check("values", values, (pool, kv_heads, block, size), q.dtype)
    check("tables", tables, (sequences, tables.shape[1]), INTEGERS)
    check("contexts", contexts, (sequences,), INTEGERS)
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    if not (keys.is_contiguous() and values.is_contiguous() and out.is_contiguous()):
        raise ValueError("keys, values and out must be contiguous: copying whole pools would hide the cost")
    if q.stride(2) != 1 or q.stride(1) != size:
        q = q.contiguous()
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    parts = torch.empty(splits.most, heads, size, dtype=torch.float32, device=q.device)
    stats = torch.empty(splits.most, heads, 2, dtype=torch.float32, device=q.device)
    attend[(splits.most, kv_heads)](
        *(q, keys, values, tables, contexts.contiguous(), splits.plan, out, parts, stats),
        *(q.stride(0), tables.stride(0), sequences, kv_heads, scale * LOG2_E, scope.cap * LOG2_E, scope.window),
        **blocks(heads // kv_heads, size, block, sequences, q.dtype, scope.cap > 0),
        **chain(),
    )
    merge_splits[(sequences, heads)](parts, stats, splits.plan, out, heads, **merge_blocks(size), **chain())
