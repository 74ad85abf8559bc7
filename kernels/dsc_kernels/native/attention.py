"""Attention over the pools of keys and values where they lie, and what is written to them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.native.dispatch import module, threads
from dsc_kernels.native.tensors import address, check, half

UNLIMITED = 2**62  # positions, where none is looked up


def store_kv(
    qkv: Tensor,
    heads: int,
    angles: Tensor | None,
    positions: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Write new tokens' keys and values to the pools; queries (in place) and keys are turned by `angles` first.

    qkv [T, heads + 2 · kv heads, size], contiguous; angles float32 [positions, 2, size / 2] (cosines, sines) or None;
    positions, blocks, offsets: int64 [T]; keys, values: [blocks, kv heads, block, size].
    """
    tokens, _, size = qkv.shape
    blocks_held, kv_heads, block, _ = keys.shape
    check("qkv", qkv, (tokens, heads + 2 * kv_heads, size), qkv.dtype, in_place=True)
    check_pools(keys, values, size, qkv.dtype)
    for name, column in (("positions", positions), ("blocks", blocks), ("offsets", offsets)):
        check(name, column, (tokens,), torch.int64, in_place=True)
    turned = UNLIMITED if angles is None else check_angles(angles, size)
    if tokens:
        module().store_kv(
            *(half(qkv.dtype), qkv.data_ptr(), address(angles), positions.data_ptr(), blocks.data_ptr()),
            *(offsets.data_ptr(), keys.data_ptr(), values.data_ptr(), tokens, heads, kv_heads, size, block),
            *(blocks_held, turned, threads()),
        )


def check_pools(keys: Tensor, values: Tensor, size: int, dtype: torch.dtype) -> None:
    for name, pool in (("keys", keys), ("values", values)):
        check(name, pool, (*keys.shape[:3], size), dtype, in_place=True)


def check_angles(angles: Tensor, size: int) -> int:
    """How many positions there are angles for."""
    check("angles", angles, (angles.shape[0], 2, size // 2), torch.float32, in_place=True)
    if size % 2:
        raise ValueError(f"heads of {size} numbers have no halves to turn")
    return angles.shape[0]


def check_heads(heads: int, kv_heads: int) -> int:
    """Query heads per key-value head."""
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    return heads // kv_heads


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values, without copying them.

    q [S, heads, size] (rows may be strided); keys, values [blocks, kv heads, block, size], contiguous; tables int64
    [S, W]; contexts int64 [S], at most `longest`. Returns [S, heads, size]; an empty context gives zeros.
    """
    batch, heads, size = q.shape
    blocks, kv_heads, block, _ = keys.shape
    group = check_heads(heads, kv_heads)
    check("q", q, (batch, heads, size), q.dtype)
    check_pools(keys, values, size, q.dtype)
    check("tables", tables, (batch, tables.shape[1]), torch.int64)
    check("contexts", contexts, (batch,), torch.int64)
    if longest > tables.shape[1] * block:
        raise ValueError(f"tables {list(tables.shape)} of {block}-token blocks do not hold contexts of {longest}")
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    contexts = contexts.contiguous()
    q = in_rows(q)
    out = torch.empty(batch, heads, size, dtype=q.dtype)
    if batch:
        module().attention(
            *(half(q.dtype), q.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), contexts.data_ptr()),
            *(out.data_ptr(), batch, q.stride(0), tables.stride(0), kv_heads, group, size, block, blocks, longest),
            *(scale, threads()),
        )
    return out


def chunk_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: int, scale: float) -> Tensor:
    """Attention of the last tokens of one sequence, each up to itself, over paged keys and values as they lie.

    q [n, heads, size] (rows may be strided): positions context − n … context − 1; keys, values [blocks, kv heads,
    block, size], contiguous; table int64 [W]. Returns [n, heads, size].
    """
    count, heads, size = q.shape
    blocks, kv_heads, block, _ = keys.shape
    group = check_heads(heads, kv_heads)
    check("q", q, (count, heads, size), q.dtype)
    check_pools(keys, values, size, q.dtype)
    check("table", table, (table.shape[0],), torch.int64)
    if not count <= context <= table.shape[0] * block:
        raise ValueError(f"{table.shape[0]} blocks of {block} tokens do not hold {context}, of which {count} are new")
    table, q = table.contiguous(), in_rows(q)
    out = torch.empty(count, heads, size, dtype=q.dtype)
    if count:
        module().chunk_attention(
            *(half(q.dtype), q.data_ptr(), keys.data_ptr(), values.data_ptr(), table.data_ptr(), out.data_ptr()),
            *(count, q.stride(0), context, kv_heads, group, size, block, blocks, scale, threads()),
        )
    return out


def in_rows(q: Tensor) -> Tensor:
    """Queries [T, heads, size] with each token's heads in one piece."""
    return q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
