"""The backend of these kernels: operators and layers that take what their twins in `plain` and `native` take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsc_kernels import plain
from dsc_kernels.adapters import adapter as adapter
from dsc_kernels.adapters import basis as basis
from dsc_kernels.adapters import summed as summed
from dsc_kernels.gpu import attention, chunk_attention, qkv
from dsc_kernels.gpu.add_norm import rstd_of
from dsc_kernels.gpu.contract import contract
from dsc_kernels.gpu.expand import expand
from dsc_kernels.gpu.ffn import NAME
from dsc_kernels.gpu.ffn import Ffn as Ffn
from dsc_kernels.gpu.ffn import Linear as Linear
from dsc_kernels.gpu.ffn import Mlp as Mlp
from dsc_kernels.gpu.ffn import Moe as Moe
from dsc_kernels.gpu.ffn_in import router_logits
from dsc_kernels.gpu.select import select
from dsc_kernels.gpu.stack import stack as stack
from dsc_kernels.plain import norm as norm
from dsc_kernels.weights import WHOLE, AtomBank, ChunkPlace, KvCache, QkNorm, Scope, Slots

name = NAME
dequantises: tuple[str, ...] = ("router", "bank", "experts")
Head = Linear


def compose_rows(static: Tensor, x: Tensor, picked: Tensor, weights: Tensor, bank: AtomBank, rank: int = 0) -> Tensor:
    """As `backend.Backend` says; rows of weight 0 are read, too, since which they are is not known to the host."""
    u, v, gamma = bank.u, bank.v, bank.gamma.float().contiguous()
    assert isinstance(u, Tensor) and isinstance(v, Tensor)
    picks = picked.to(torch.int32)
    latent = contract(x, u, picks, weights, rank)
    return expand(latent, v, picks, gamma, static, None, x.dtype, rank)


def served(cache: KvCache) -> bool:
    """Whether the kernels of attention take such a cache; torch takes the others."""
    return not (cache.latent or cache.in_int8)


def places_chunks(cache: KvCache) -> bool:
    """As `backend.Backend` says."""
    return served(cache)


def store_kv(
    qkv_rows: Tensor,
    heads: int,
    cos_sin_cache: Tensor | None,
    slots: Slots,
    cache: KvCache,
    qk_norm: QkNorm | None = None,
) -> None:
    """As `backend.Backend` says; the kernel norms heads each by itself, torch where that differs."""
    apart = qk_norm is None or qk_norm.key.shape == (qkv_rows.shape[2],)
    if not (served(cache) and apart):
        plain.store_kv(qkv_rows, heads, cos_sin_cache, slots, cache, qk_norm)
    else:
        qkv.store_kv(qkv_rows, heads, cos_sin_cache, slots, cache, qk_norm)


def decode_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """As `backend.Backend` says."""
    if not served(cache):
        return plain.decode_attention(q, cache, tables, contexts, max_context_len, scale, scope)
    return attention.decode_attention(q, cache, tables, contexts, max_context_len, scale, scope)


def chunks_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    chunks: Iterable[ChunkPlace],
    out: Tensor,
    scale: float,
    scope: Scope = WHOLE,
) -> None:
    """As `backend.Backend` says."""
    if not served(cache):
        plain.chunks_attention(q, cache, tables, chunks, out, scale, scope)
    else:
        tiles = chunk_attention.tiles_of(chunks, q.shape[1] // cache.keys.shape[1], q.device)
        chunk_attention.chunk_attention(q, cache, tables, tiles, out, scale, scope)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, tau: float, eps: float, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms int32 [B, k], coefficients float32 [B, k] and signal [B]; see `reference.route`."""
    rstd = None if norm_eps is None else rstd_of(x, norm_eps)
    logits, maxima = router_logits(x, weight, None if bias is None else bias.float(), tau, rstd)
    return select(logits, maxima, k, eps)


def compose(static: Tensor, x: Tensor, atoms: Tensor, weights: Tensor, u: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """static [B, d] plus the dynamic part of the picked atoms, in x's dtype."""
    atoms, weights = atoms.int(), weights.float()
    return expand(contract(x, u, atoms, weights), v, atoms, gamma.float(), static, None, x.dtype)
