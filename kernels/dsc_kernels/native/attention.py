"""Attention over the cached keys and values where they lie, and what is written to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsc_kernels.native.dispatch import threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.tensors import address, check, is_bf16
from dsc_kernels.weights import SCALE_BYTES, KvCache, QkNorm, Slots

UNLIMITED = 2**62  # positions, where none is looked up


def store_kv(
    qkv: Tensor,
    heads: int,
    cos_sin_cache: Tensor | None,
    slots: Slots,
    cache: KvCache,
    qk_norm: QkNorm | None = None,
) -> None:
    """Write new tokens' keys and values to the cache; queries (in place) and keys are normed and turned first.

    qkv [T, heads + 2 · kv heads, size], contiguous; cos_sin_cache float32 [positions, 2, turned / 2], None: nothing is
    turned. Raises ValueError for what does not fit, also for numbers in the slots.
    """
    tokens, _, size = qkv.shape
    (positions, blocks, offsets), (keys, values) = slots, cache
    num_blocks, kv_heads, block, _ = keys.shape
    check("qkv", qkv, (tokens, heads + 2 * kv_heads, size), qkv.dtype, in_place=True)
    int8_kv = check_cache(cache, size, qkv.dtype)
    for name, column in (("positions", positions), ("blocks", blocks), ("offsets", offsets)):
        check(name, column, (tokens,), torch.int64, in_place=True)
    num_positions = UNLIMITED if cos_sin_cache is None else check_cos_sin(cos_sin_cache, size)
    norms = () if qk_norm is None else check_qk_norm(qk_norm, heads, kv_heads, size, qkv.dtype)
    if tokens:
        kernels.store_kv(
            is_bf16=is_bf16(qkv.dtype),
            qkv=qkv.data_ptr(),
            **qk_norm_arguments(qk_norm, *norms),
            turned=turned_numbers(cos_sin_cache),
            cos_sin_cache=address(cos_sin_cache),
            positions=positions.data_ptr(),
            blocks=blocks.data_ptr(),
            offsets=offsets.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            block=block,
            num_blocks=num_blocks,
            num_positions=num_positions,
            int8_kv=int8_kv,
            threads=threads(),
        )


def check_cache(cache: KvCache, size: int, dtype: torch.dtype) -> int:
    """Whether it is in int8, as C++ is told."""
    int8 = cache.in_int8
    shape = (*cache.keys.shape[:3], size + SCALE_BYTES * int8)
    check("keys", cache.keys, shape, torch.int8 if int8 else dtype, in_place=True)
    check("values", cache.values, shape, torch.int8 if int8 else dtype, in_place=True)
    return int(int8)


def check_cos_sin(cos_sin_cache: Tensor, size: int) -> int:
    """How many positions there are cosines and sines for."""
    positions, _, half = cos_sin_cache.shape
    check("cos_sin_cache", cos_sin_cache, (positions, 2, half), torch.float32, in_place=True)
    if size % 2:
        raise ValueError(f"heads of {size} numbers have no halves to turn")
    if not 0 < 2 * half <= size:
        raise ValueError(f"cos_sin_cache turns {2 * half} numbers of each head; there are {size}")
    return positions


def turned_numbers(cos_sin_cache: Tensor | None) -> int:
    """How many numbers of each head are turned."""
    return 0 if cos_sin_cache is None else 2 * cos_sin_cache.shape[2]


def check_qk_norm(
    qk_norm: QkNorm, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, bool]:
    """The norm's weights, contiguous, and whether they are of all heads together."""
    together = qk_norm.query.shape != (size,) or qk_norm.key.shape != (size,)
    shapes = ((heads * size,), (kv_heads * size,)) if together else ((size,), (size,))
    check("the norm of queries", qk_norm.query, shapes[0], dtype)
    check("the norm of keys", qk_norm.key, shapes[1], dtype)
    return qk_norm.query.contiguous(), qk_norm.key.contiguous(), together


def qk_norm_arguments(
    qk_norm: QkNorm | None, query: Tensor | None = None, key: Tensor | None = None, together: bool = False
) -> dict[str, Any]:
    """What C++ is told of a norm that was checked, whose weights are these."""
    eps = 0.0 if qk_norm is None else qk_norm.eps
    return {
        "query_norm": address(query),
        "key_norm": address(key),
        "qk_norm_eps": eps,
        "qk_norm_together": int(together),
    }


def check_heads(heads: int, kv_heads: int) -> int:
    """Query heads per key-value head."""
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    return heads // kv_heads


def decode_attention(
    q: Tensor, cache: KvCache, tables: Tensor, contexts: Tensor, max_context_len: int, scale: float
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values, without copying them.

    q [S, heads, size] (rows may be strided); tables int64 [S, W]; contexts int64 [S], at most `max_context_len`.
    Returns [S, heads, size]; an empty context gives zeros. Raises ValueError for what does not fit.
    """
    keys, values = cache
    batch, heads, size = q.shape
    num_blocks, kv_heads, block, _ = keys.shape
    group = check_heads(heads, kv_heads)
    check("q", q, (batch, heads, size), q.dtype)
    int8_kv = check_cache(cache, size, q.dtype)
    check("tables", tables, (batch, tables.shape[1]), torch.int64)
    check("contexts", contexts, (batch,), torch.int64)
    if max_context_len > tables.shape[1] * block:
        shape = list(tables.shape)
        raise ValueError(f"tables {shape} of {block}-token blocks do not hold contexts of {max_context_len}")
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    contexts = contexts.contiguous()
    q = in_rows(q)
    out = torch.empty(batch, heads, size, dtype=q.dtype)
    if batch:
        kernels.attention(
            is_bf16=is_bf16(q.dtype),
            q=q.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            tables=tables.data_ptr(),
            contexts=contexts.data_ptr(),
            out=out.data_ptr(),
            batch=batch,
            q_stride=q.stride(0),
            width=tables.stride(0),
            kv_heads=kv_heads,
            group=group,
            size=size,
            block=block,
            num_blocks=num_blocks,
            max_context_len=max_context_len,
            scale=scale,
            int8_kv=int8_kv,
            threads=threads(),
        )
    return out


def chunk_attention(q: Tensor, cache: KvCache, table: Tensor, context: int, scale: float) -> Tensor:
    """Attention of the last tokens of one sequence, each up to itself, over paged keys and values as they lie.

    q [n, heads, size] (rows may be strided): positions context − n … context − 1; table int64 [W].
    Returns [n, heads, size]. Raises ValueError for what does not fit.
    """
    keys, values = cache
    count, heads, size = q.shape
    num_blocks, kv_heads, block, _ = keys.shape
    group = check_heads(heads, kv_heads)
    check("q", q, (count, heads, size), q.dtype)
    int8_kv = check_cache(cache, size, q.dtype)
    check("table", table, (table.shape[0],), torch.int64)
    if not count <= context <= table.shape[0] * block:
        raise ValueError(f"{table.shape[0]} blocks of {block} tokens do not hold {context}, of which {count} are new")
    table, q = table.contiguous(), in_rows(q)
    out = torch.empty(count, heads, size, dtype=q.dtype)
    if count:
        kernels.chunk_attention(
            is_bf16=is_bf16(q.dtype),
            q=q.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            table=table.data_ptr(),
            out=out.data_ptr(),
            count=count,
            q_stride=q.stride(0),
            context=context,
            kv_heads=kv_heads,
            group=group,
            size=size,
            block=block,
            num_blocks=num_blocks,
            scale=scale,
            int8_kv=int8_kv,
            threads=threads(),
        )
    return out


def in_rows(q: Tensor) -> Tensor:
    """Queries [T, heads, size] with each token's heads in one piece."""
    return q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
