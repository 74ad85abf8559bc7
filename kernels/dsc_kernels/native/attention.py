"""Attention over the cached keys and values where they lie, and what is written to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsc_kernels.chunks import one_by_one
from dsc_kernels.native.dispatch import threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.tensors import address, check, is_bf16
from dsc_kernels.weights import SCALE_BYTES, WHOLE, KvCache, QkNorm, Scope, Slots

UNLIMITED = 2**62  # positions, where none is looked up


def places_chunks(cache: KvCache) -> bool:
    """As `backend.Backend` says: chunks begin behind all single tokens here."""
    return False


def store_kv(
    qkv: Tensor,
    heads: int,
    cos_sin_cache: Tensor | None,
    slots: Slots,
    cache: KvCache,
    qk_norm: QkNorm | None = None,
) -> None:
    """Write new tokens' keys and values to the cache; queries (in place) and keys are normed and turned first.

    qkv [T, heads + 2 · kv heads, size], contiguous, without values where they lie within keys; cos_sin_cache float32
    [positions, 2, turned / 2], None: nothing is turned. Raises ValueError for what does not fit, also for numbers in
    the slots.
    """
    tokens, _, size = qkv.shape
    (positions, blocks, offsets), (keys, values) = slots, cache
    num_blocks, kv_heads, block, _ = keys.shape
    check("qkv", qkv, (tokens, heads + (1 if cache.latent else 2) * kv_heads, size), qkv.dtype, in_place=True)
    value_size = check_cache(cache, size, qkv.dtype)
    for name, column in (("positions", positions), ("blocks", blocks), ("offsets", offsets)):
        check(name, column, (tokens,), torch.int64, in_place=True)
    num_positions = UNLIMITED if cos_sin_cache is None else check_cos_sin(cos_sin_cache, size)
    norms = None if qk_norm is None else check_qk_norm(qk_norm, heads, kv_heads, size, value_size, qkv.dtype)
    if tokens:
        norm = qk_norm_arguments(norms, size)
        kernels.store_kv(
            is_bf16=is_bf16(qkv.dtype),
            qkv=qkv.data_ptr(),
            query_norm=norm["query_norm"],
            key_norm=norm["key_norm"],
            key_norm_skipped=norm["key_norm_skipped"],
            qk_norm_eps=norm["qk_norm_eps"],
            qk_norm_together=norm["qk_norm_together"],
            turned=turned_numbers(cos_sin_cache),
            cos_sin_cache=address(cos_sin_cache),
            positions=positions.data_ptr(),
            blocks=blocks.data_ptr(),
            offsets=offsets.data_ptr(),
            keys=keys.data_ptr(),
            values=0 if cache.latent else values.data_ptr(),
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            block=block,
            num_blocks=num_blocks,
            num_positions=num_positions,
            int8_kv=int(cache.in_int8),
            threads=threads(),
        )


def check_cache(cache: KvCache, size: int, dtype: torch.dtype) -> int:
    """The size of a value."""
    dtype, behind = (torch.int8, SCALE_BYTES) if cache.in_int8 else (dtype, 0)
    shape = (*cache.keys.shape[:3], size + behind)
    check("keys", cache.keys, shape, dtype, in_place=True)
    if not cache.latent:
        check("values", cache.values, shape, dtype, in_place=True)
        return size
    own = cache.values.shape[-1]
    check("values", cache.values, (*shape[:3], own), dtype)
    last = cache.keys.data_ptr() + (size - own) * dtype.itemsize
    if cache.values.data_ptr() != last or cache.values.stride() != cache.keys.stride():
        raise ValueError(f"values of {own} numbers are shorter than keys of {size}, but are not the last of these")
    return own


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


def check_qk_norm(qk_norm: QkNorm, heads: int, kv_heads: int, size: int, value_size: int, dtype: torch.dtype) -> QkNorm:
    """The same with contiguous weights. Raises ValueError for weights of other sizes."""
    if qk_norm.query is None:
        check("the norm of keys", qk_norm.key, (value_size,), dtype)
        return QkNorm(None, qk_norm.key.contiguous(), qk_norm.eps)
    together = qk_norm.query.shape != (size,) or qk_norm.key.shape != (size,)
    shapes = ((heads * size,), (kv_heads * size,)) if together else ((size,), (size,))
    check("the norm of queries", qk_norm.query, shapes[0], dtype)
    check("the norm of keys", qk_norm.key, shapes[1], dtype)
    return QkNorm(qk_norm.query.contiguous(), qk_norm.key.contiguous(), qk_norm.eps)


def qk_norm_arguments(qk_norm: QkNorm | None, size: int) -> dict[str, Any]:
    """What C++ is told of a norm that `check_qk_norm` gave, for heads of this size."""
    query, key = (None, None) if qk_norm is None else (qk_norm.query, qk_norm.key)
    width = size if key is None else key.shape[0]
    return {
        "query_norm": address(query),
        "key_norm": address(key),
        "key_norm_skipped": max(size - width, 0),
        "qk_norm_eps": 0.0 if qk_norm is None else qk_norm.eps,
        "qk_norm_together": int((query is not None and query.shape != (size,)) or width > size),
    }


def check_scope(scope: Scope) -> None:
    """Raise ValueError for a window or a bound below 0."""
    if scope.window < 0 or not scope.cap >= 0:
        raise ValueError(f"a window of {scope.window} and scores within {scope.cap}; neither may be below 0")


def check_heads(heads: int, kv_heads: int) -> int:
    """Query heads per key-value head."""
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    return heads // kv_heads


def decode_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values, without copying them.

    q [S, heads, size] (rows may be strided); tables int64 [S, W]; contexts int64 [S], at most `max_context_len`.
    Returns [S, heads, value size]; an empty context gives zeros. Raises ValueError for what does not fit.
    """
    keys, values = cache
    batch, heads, size = q.shape
    num_blocks, kv_heads, block, _ = keys.shape
    group = check_heads(heads, kv_heads)
    check("q", q, (batch, heads, size), q.dtype)
    value_size = check_cache(cache, size, q.dtype)
    check_scope(scope)
    check("tables", tables, (batch, tables.shape[1]), torch.int64)
    check("contexts", contexts, (batch,), torch.int64)
    if max_context_len > tables.shape[1] * block:
        shape = list(tables.shape)
        raise ValueError(f"tables {shape} of {block}-token blocks do not hold contexts of {max_context_len}")
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    contexts = contexts.contiguous()
    q = in_rows(q)
    out = torch.empty(batch, heads, value_size, dtype=q.dtype)
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
            value_size=value_size,
            block=block,
            window=scope.window,
            num_blocks=num_blocks,
            max_context_len=max_context_len,
            scale=scale,
            cap=scope.cap,
            int8_kv=int(cache.in_int8),
            threads=threads(),
        )
    return out


def chunk_attention(
    q: Tensor, cache: KvCache, table: Tensor, context: int, scale: float, scope: Scope = WHOLE
) -> Tensor:
    """Attention of the last tokens of one sequence, each up to itself, over paged keys and values as they lie.

    q [n, heads, size] (rows may be strided): positions context − n … context − 1; table int64 [W].
    Returns [n, heads, value size]. Raises ValueError for what does not fit.
    """
    keys, values = cache
    count, heads, size = q.shape
    num_blocks, kv_heads, block, _ = keys.shape
    group = check_heads(heads, kv_heads)
    check("q", q, (count, heads, size), q.dtype)
    value_size = check_cache(cache, size, q.dtype)
    check_scope(scope)
    check("table", table, (table.shape[0],), torch.int64)
    if not count <= context <= table.shape[0] * block:
        raise ValueError(f"{table.shape[0]} blocks of {block} tokens do not hold {context}, of which {count} are new")
    table, q = table.contiguous(), in_rows(q)
    out = torch.empty(count, heads, value_size, dtype=q.dtype)
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
            value_size=value_size,
            block=block,
            window=scope.window,
            num_blocks=num_blocks,
            scale=scale,
            cap=scope.cap,
            int8_kv=int(cache.in_int8),
            threads=threads(),
        )
    return out


chunks_attention = one_by_one(chunk_attention)


def in_rows(q: Tensor) -> Tensor:
    """Queries [T, heads, size] with each token's heads in one piece."""
    return q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
