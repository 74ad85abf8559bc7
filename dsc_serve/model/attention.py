"""Grouped-query attention over a paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import KvCache, QkNorm
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import ModelConfig


class Attention:
    """One layer's attention: fused q, k, v projection, write to the pool, attend, output projection.

    qkv [(heads + 2 kv_heads) · head_dim, d], out [d, heads · head_dim], each with its bias or None.
    cos_sin_cache: `rope_table`, or None where nothing is turned.
    """

    def __init__(
        self,
        config: ModelConfig,
        cos_sin_cache: Tensor | None,
        qkv: Weight,
        out: Weight,
        qkv_bias: Tensor | None,
        out_bias: Tensor | None,
        qk_norm: QkNorm | None = None,
    ) -> None:
        self.config, self.cos_sin_cache, self.qk_norm = config, cos_sin_cache, qk_norm
        self.qkv, self.out = ops.linear(qkv, qkv_bias), ops.linear(out, out_bias)
        self.scale = config.head_dim**-0.5

    def __call__(self, x: Tensor, batch: StepBatch, cache: KvCache, residual: Tensor | None) -> Tensor:
        """x [T, d] → [T, d], plus residual where one is given. cache: this layer's."""
        c = self.config
        qkv = self.qkv(x).view(x.shape[0], -1, c.head_dim)
        heads = c.num_attention_heads
        ops.store_kv(qkv, heads, self.cos_sin_cache, batch.slots, cache, self.qk_norm)
        q = qkv[:, :heads]
        n = batch.decodes
        if n == x.shape[0]:
            y = ops.decode_attention(q, cache, batch.block_tables, batch.context_lens, batch.decode_context, self.scale)
        else:
            y = self._mixed(q, batch, cache)
        return self.out(y.flatten(1), residual=residual)

    def _mixed(self, q: Tensor, batch: StepBatch, cache: KvCache) -> Tensor:
        """A step that holds chunks of prompts besides, or instead of, single tokens."""
        n, tables = batch.decodes, batch.block_tables
        y = torch.empty_like(q)
        if n:
            contexts = batch.context_lens[:n]
            y[:n] = ops.decode_attention(q[:n], cache, tables[:n], contexts, batch.decode_context, self.scale)
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.start + chunk.length)
            y[rows] = ops.chunk_attention(q[rows], cache, tables[chunk.row], chunk.context, self.scale)
        return y
