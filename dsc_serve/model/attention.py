"""Grouped-query attention over a paged KV cache, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import ModelConfig


def rope_table(config: ModelConfig) -> Tensor:
    """cos and sin of every position's angles: float32 [positions, 2, head_dim / 2]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * config.rope_theta**-half
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the halves of each head x [T, heads, head_dim] by angles [T, 2, head_dim / 2], in float32 or wider."""
    cos, sin = angles[:, None, 0], angles[:, None, 1]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention:
    """One layer's attention: fused q, k, v projection, write to the pool, attend, output projection.

    qkv [(heads + 2 kv_heads) · head_dim, d], out [d, heads · head_dim].
    """

    def __init__(self, config: ModelConfig, qkv: Tensor, out: Tensor) -> None:
        self.config = config
        self.qkv, self.out = qkv, out
        self.scale = config.head_dim**-0.5

    def __call__(self, x: Tensor, batch: StepBatch, angles: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        """x [T, d] → [T, d]. keys and values are this layer's pools [blocks, kv heads, block size, head size]."""
        c = self.config
        fused = ops.linear(x, self.qkv).view(x.shape[0], -1, c.head_dim)
        sizes = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        q, k, v = torch.split(fused, sizes, dim=1)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        keys[batch.slot_blocks, :, batch.slot_offsets] = k
        values[batch.slot_blocks, :, batch.slot_offsets] = v
        y = torch.empty_like(q)
        if batch.decodes:
            y[: batch.decodes] = self._decode(q[: batch.decodes], batch, keys, values)
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.start + chunk.length)
            context_k, context_v = (
                self._context(pool, batch.block_tables[chunk.row : chunk.row + 1], chunk.context)
                for pool in (keys, values)
            )
            seen = torch.ones(chunk.length, chunk.context, dtype=torch.bool, device=x.device)
            y[rows] = self._attend(
                q[rows].transpose(0, 1)[None], context_k, context_v, seen.tril(chunk.context - chunk.length)
            )[0].transpose(0, 1)
        return ops.linear(y.flatten(1), self.out)

    def _decode(self, q: Tensor, batch: StepBatch, keys: Tensor, values: Tensor) -> Tensor:
        length, tables = batch.decode_context, batch.block_tables[: batch.decodes]
        seen = torch.arange(length, device=q.device)[None] < batch.context_lens[: batch.decodes, None]
        context_k, context_v = (self._context(pool, tables, length) for pool in (keys, values))
        return self._attend(q[:, :, None], context_k, context_v, seen[:, None, None])[:, :, 0]

    def _context(self, pool: Tensor, tables: Tensor, length: int) -> Tensor:
        """The first `length` cached rows of each sequence: [S, kv heads, length, head size], copied from its blocks."""
        blocks = -(-length // pool.shape[2])
        gathered = pool[tables[:, :blocks]].transpose(1, 2)
        return gathered.reshape(tables.shape[0], pool.shape[1], blocks * pool.shape[2], -1)[:, :, :length]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        grouped = self.config.num_key_value_heads != self.config.num_attention_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
