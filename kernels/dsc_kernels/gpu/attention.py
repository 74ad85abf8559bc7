"""Attention of one new token per sequence over its paged keys and values.

Ours because no library on a package index serves: flash-attn and flashinfer need nvcc, or prebuilt wheels tied to one
version of torch and CUDA, and vLLM's kernels come only with vLLM. It takes the engine's pools and tables as they are.

Long contexts are split over programs; the parts are merged by their running maxima and sums.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.compiler import Meta, check, kernel, power_of_2, stages
from dsc_kernels.weights import KvCache

LOG2_E = 1.4426950408889634
POSITIONS_PER_SPLIT = 256
ENOUGH_PROGRAMS = 256
MAX_SPLITS = 32


@kernel
def attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    out: tl.tensor,
    stats: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    group: tl.constexpr,
    group_width: tl.constexpr,
    size: tl.constexpr,
    size_width: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    positions_per_step: tl.constexpr,
) -> None:
    """The query heads of one key-value head over one split of a context: grid (sequences, kv heads, splits).

    `scale` is in base 2. With several splits, out [S, H, splits, size] holds sums that are not divided yet, and
    stats [S, H, splits, 2] the maximum and the sum of weights of each.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + sequence).to(tl.int32)
    steps = (context + positions_per_step - 1) // positions_per_step
    per_split = ((steps + splits - 1) // splits) * positions_per_step
    begin = split * per_split
    end = tl.minimum(begin + per_split, context)
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
        where = tl.load(tables + sequence * table_stride + position // block, mask=seen, other=0)
        row = ((where * kv_heads + kv_head) * block + position % block) * size
        key = tl.load(keys + row[None, :] + column[:, None], mask=seen[None, :] & is_column[:, None], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        value = tl.load(values + row[:, None] + column[None, :], mask=seen[:, None] & is_column[None, :], other=0.0)
        weight_sums = weight_sums * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
        best = new_best
    at = (sequence * kv_heads * group + head) * splits + split
    if splits == 1:
        sums = sums / tl.where(weight_sums == 0.0, 1.0, weight_sums)[:, None]
    else:
        tl.store(stats + at * 2, best, mask=is_head)
        tl.store(stats + at * 2 + 1, weight_sums, mask=is_head)
    tl.store(out + at[:, None] * size + column[None, :], sums.to(out.dtype.element_ty), mask=mine)


@kernel
def merge_splits(
    parts: tl.tensor,
    stats: tl.tensor,
    out: tl.tensor,
    size: tl.constexpr,
    size_width: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """One head of one sequence from its splits: grid (sequences · heads,)."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, splits), tl.arange(0, size_width)
    best = tl.load(stats + (row * splits + split) * 2)
    weight_sums = tl.load(stats + (row * splits + split) * 2 + 1)
    share = tl.where(weight_sums == 0.0, 0.0, tl.exp2(best - tl.max(best, 0)))
    at = (row * splits + split)[:, None] * size + column[None, :]
    sums = tl.sum(tl.load(parts + at, mask=(column < size)[None, :], other=0.0) * share[:, None], 0)
    total = tl.sum(weight_sums * share, 0)
    sums = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * size + column, sums.to(out.dtype.element_ty), mask=column < size)


def split_count(sequences: int, kv_heads: int, max_context_len: int) -> int:
    """A power of two: enough programs to fill a GPU, but no split shorter than POSITIONS_PER_SPLIT."""
    wanted = min(ENOUGH_PROGRAMS // max(sequences * kv_heads, 1), max_context_len // POSITIONS_PER_SPLIT, MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def blocks(group: int, size: int, block: int, splits: int, dtype: torch.dtype) -> Meta:
    """Tile sizes: tensor cores want 16 rows, so small groups are padded; reading the context is what takes time.

    16 KiB of keys at a time leave room for their values and a second stage in the 64 KiB that AMD GPUs have.
    """
    width = power_of_2(size, 16)
    positions = min(64, max(16, 16384 // (width * dtype.itemsize)))
    tiles = {"group": group, "group_width": power_of_2(group, 16), "size": size, "size_width": width}
    rest = {"block": block, "splits": splits, "positions_per_step": positions}
    return {**tiles, **rest, "num_warps": 4, "num_stages": stages(2)}


def merge_blocks(size: int, splits: int) -> Meta:
    """Tile sizes of the merge."""
    return {"size": size, "size_width": power_of_2(size), "splits": splits, "num_warps": 1}


def decode_attention(
    q: Tensor, cache: KvCache, tables: Tensor, contexts: Tensor, max_context_len: int, scale: float
) -> Tensor:
    """softmax(q Kᵀ · scale) V over the first `contexts` positions of each sequence: [S, heads, size] in q's dtype.

    q [S, heads, size] (rows may be strided); the cache has q's dtype; tables int64 [S, W]; contexts int64 [S], at most
    `max_context_len`. An empty context gives zeros.
    """
    keys, values = cache
    sequences, heads, size = q.shape
    pool, kv_heads, block, _ = keys.shape
    check("q", q, (sequences, heads, size))
    check("keys", keys, (pool, kv_heads, block, size), q.dtype)
    check("values", values, (pool, kv_heads, block, size), q.dtype)
    check("tables", tables, (sequences, tables.shape[1]), torch.int64)
    check("contexts", contexts, (sequences,), torch.int64)
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: copying whole pools would hide the cost")
    if q.stride(2) != 1 or q.stride(1) != size:
        q = q.contiguous()
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    out = torch.empty(sequences, heads, size, dtype=q.dtype, device=q.device)
    if not sequences:
        return out
    splits = split_count(sequences, kv_heads, max_context_len)
    parts, stats = out, None
    if splits > 1:
        parts = torch.empty(sequences, heads, splits, size, dtype=torch.float32, device=q.device)
        stats = torch.empty(sequences, heads, splits, 2, dtype=torch.float32, device=q.device)
    attend[(sequences, kv_heads, splits)](
        *(q, keys, values, tables, contexts.contiguous(), parts, stats),
        *(q.stride(0), tables.stride(0), kv_heads, scale * LOG2_E),
        **blocks(heads // kv_heads, size, block, splits, q.dtype),
    )
    if splits > 1:
        merge_splits[(sequences * heads,)](parts, stats, out, **merge_blocks(size, splits))
    return out
