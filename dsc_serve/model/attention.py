"""Grouped-query attention over a paged KV cache."""

from __future__ import annotations

from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.adapters import adapted_product
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Adapted, KvCache, QkNorm, Scope
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import ModelConfig


class Attention:
    """One layer's attention: fused q, k, v projection, write to the pool, attend, output projection.

    qkv [(heads + 2 kv_heads) · head_dim, d], out [d, heads · head_dim], each with its bias or None; where values lie
    within keys qkv [(heads + 1) · head_dim, d], out [d, heads · latent_size].
    cos_sin_cache: `rope_table`, or None where nothing is turned. group: the layer's, of `LayerGroups`.
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
        group: int = 0,
    ) -> None:
        window = config.window if config.window < config.max_position_embeddings else 0  # which no text would feel
        self.group, self.scope = group, Scope(window, config.attention_cap)
        self.config, self.cos_sin_cache, self.qk_norm = config, cos_sin_cache, qk_norm
        self.qkv, self.out = ops.linear(qkv, qkv_bias), ops.linear(out, out_bias)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Tensor, batch: StepBatch, cache: KvCache, residual: Tensor | None, adapted: Adapted | None = None
    ) -> Tensor:
        """x [T, d] → [T, d], plus residual where one is given. cache: this layer's. adapted: adds to projections."""
        c = self.config
        if adapted is None:
            qkv = self.qkv(x)
        else:
            columns = {"q": 0, "k": c.query_size, "v": c.query_size + c.kv_size}
            qkv = adapted_product(self.qkv, x, adapted, columns)
        qkv = qkv.view(x.shape[0], -1, c.head_dim)
        heads = c.num_attention_heads
        ops.store_kv(qkv, heads, self.cos_sin_cache, batch.slots_of(self.group), cache, self.qk_norm)
        q = qkv[:, :heads]
        n, tables = batch.decodes, batch.block_tables[self.group]
        if n == x.shape[0]:
            max_context_len = batch.decode_context
            y = ops.decode_attention(q, cache, tables, batch.context_lens, max_context_len, self.scale, self.scope)
        else:
            y = self._mixed(q, batch, cache)
        if adapted is None:
            return self.out(y.flatten(1), residual=residual)
        return adapted_product(self.out, y.flatten(1), adapted, {"o": 0}, residual)

    def _mixed(self, q: Tensor, batch: StepBatch, cache: KvCache) -> Tensor:
        """A step that holds chunks of prompts besides, or instead of, single tokens."""
        n, tables, max_context_len = batch.decodes, batch.block_tables[self.group], batch.decode_context
        y = q.new_empty(*q.shape[:2], self.config.value_size)
        if n:
            contexts = batch.context_lens[:n]
            y[:n] = ops.decode_attention(q[:n], cache, tables[:n], contexts, max_context_len, self.scale, self.scope)
        ops.chunks_attention(q, cache, tables, batch.chunks, y, self.scale, self.scope)
        return y
