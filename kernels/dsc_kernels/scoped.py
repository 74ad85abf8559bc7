"""Attention in plain torch where it is not all of softmax(q Kᵀ) V: within a window, with bounded scores, or over values
that lie within keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels.kv_rows import widened_rows
from dsc_kernels.weights import KvCache, Scope


def decode_attention(
    q: Tensor, cache: KvCache, tables: Tensor, contexts: Tensor, max_context_len: int, scale: float, scope: Scope
) -> Tensor:
    """As `plain.decode_attention`: q [S, heads, size] → [S, heads, value size]."""
    positions = torch.arange(max_context_len, device=q.device)[None]
    seen = positions < contexts[:, None]
    if scope.window:
        seen &= positions >= contexts[:, None] - scope.window
    k, v = context_of(cache, tables, max_context_len, q.dtype)
    hidden = ~seen[:, None, :, None]
    return attend(q[:, :, None], k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0), seen[:, None], scale, scope)[
        :, :, 0
    ]


def chunk_attention(q: Tensor, cache: KvCache, table: Tensor, context: int, scale: float, scope: Scope) -> Tensor:
    """As `plain.chunk_attention`: q [n, heads, size] → [n, heads, value size]."""
    count, heads, _ = q.shape
    own = torch.arange(context - count, context, device=q.device)[:, None]
    positions = torch.arange(context, device=q.device)[None]
    seen = positions <= own
    if scope.window:
        seen &= positions > own - scope.window
    k, v = context_of(cache, table[None], context, q.dtype)
    # What is not finite spoils those that see it and nobody else: a mask alone would let it through.
    bad_keys, bad_values = ~k.isfinite().all(-1, keepdim=True), ~v.isfinite()
    spoilt = (seen.float() @ (bad_values | bad_keys)[0].float()) > 0
    k, v = (part.nan_to_num(0.0, 0.0, 0.0) for part in (k, v))
    out = attend(q.transpose(0, 1)[None], k, v, seen[None], scale, scope)[0]
    return out.masked_fill(spoilt.repeat_interleave(heads // k.shape[1], 0), torch.nan).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, scope: Scope) -> Tensor:
    """q [S, heads, n, size], k and v [S, kv heads, L, …], seen bool [S, n, L] → [S, heads, n, value size]."""
    sequences, heads, rows, size = q.shape
    grouped = q.reshape(sequences, k.shape[1], -1, size)
    scores = (grouped @ k.transpose(2, 3)).view(sequences, heads, rows, -1).float() * scale
    if scope.cap:
        scores = scope.cap * torch.tanh(scores / scope.cap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1)[:, None, :, None], 0.0).to(v.dtype)  # an empty context gives zeros
    return (weights.view(sequences, k.shape[1], -1, k.shape[2]) @ v).view(sequences, heads, rows, -1)


def context_of(cache: KvCache, tables: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first `length` cached keys and values of each sequence: [S, kv heads, length, …] each; int8: as dtype."""
    keys = gather_context(cache.keys, tables, length, dtype)
    if cache.latent:
        return keys, keys[..., keys.shape[-1] - cache.values.shape[-1] :]
    return keys, gather_context(cache.values, tables, length, dtype)


def gather_context(pool: Tensor, tables: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first `length` cached rows of each sequence: [S, kv heads, length, head size]; int8: as dtype."""
    blocks = -(-length // pool.shape[2])
    _, heads, size, width = pool.shape
    # One row of a pool's view for each block and head: a single copy, and that in the order in which it is read.
    rows = tables[:, None, :blocks] * heads + torch.arange(heads, device=pool.device)[None, :, None]
    flat, int8 = pool.view(-1, size * width), pool.dtype == torch.int8
    gathered = flat[rows] if int8 else F.embedding(rows, flat)
    found = gathered.view(tables.shape[0], heads, blocks * size, width)[:, :, :length]
    return widened_rows(found, dtype) if int8 else found
