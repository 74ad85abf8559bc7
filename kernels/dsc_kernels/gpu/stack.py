"""All layers of a decoder in one call, with as few launches as their results need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels.chunks import PlacedChunks
from dsc_kernels.gpu import attention, qkv
from dsc_kernels.gpu.add_norm import Parts, add_norm, summed
from dsc_kernels.gpu.attention import Splits, split_contexts
from dsc_kernels.gpu.chunk_attention import ChunkTiles, chunk_attention, tiles_of
from dsc_kernels.gpu.ffn import Ffn, Linear, Moe
from dsc_kernels.gpu.product import fused
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import OUTPUT_ONLY, AdapterRun, ChunkPlace, DecoderLayer, KvCache, LayerOutputs, Slots


def stack(
    token_embedding: Weight,
    position_embedding: Tensor | None,
    layers: Sequence[DecoderLayer],
    embedding_scale: float = 1.0,
) -> Stack | None:
    """Embeddings and all layers in one call, where each is one for `ours`; None elsewhere. See `Stack`."""
    own = [found for layer in layers if (found := ours(layer)) is not None]
    if not isinstance(token_embedding, Tensor) or len(own) < len(layers):
        return None
    return Stack(token_embedding, position_embedding, own, embedding_scale)


def ours(layer: DecoderLayer) -> OurLayer | None:
    """A layer that has its norms before its branches, and products of whole weights and an FFN of this backend.

    Its values are as wide as its keys, and heads are normed each by itself or not at all. None for others.
    """
    qkv_, out, ffn = layer.qkv, layer.out, layer.ffn
    if not (isinstance(qkv_, Linear) and isinstance(out, Linear) and isinstance(ffn, Ffn | Moe)):
        return None
    if layer.norms != "before" or not all(isinstance(linear.weight, Tensor) for linear in (qkv_, out)):
        return None
    size = layer.size or qkv_.weight.shape[0] // (layer.heads + 2 * layer.kv_heads)
    normed = layer.qk_norm is None or layer.qk_norm.key.shape == (size,)
    if out.weight.shape[1] != layer.heads * size or not normed:
        return None
    return OurLayer(layer, qkv_, out, ffn, size)


class OurLayer(NamedTuple):
    """A decoder's layer with what of it is this backend's, told to the type checker."""

    described: DecoderLayer
    qkv: Linear
    out: Linear
    ffn: Ffn | Moe
    size: int


class StackStep:
    """What the layers of a step share, made where a layer first needs it: how contexts are split, and chunks cut."""

    def __init__(
        self,
        slots: Slots,
        tables: Tensor,
        contexts: Tensor,
        decodes: int,
        max_context_len: int,
        chunks: Iterable[ChunkPlace],
    ) -> None:
        self.slots, self.tables, self.contexts = slots, tables, contexts[:decodes]
        self.decodes, self.max_context_len = decodes, max_context_len
        self.chunks: PlacedChunks | list[ChunkPlace] = chunks if isinstance(chunks, PlacedChunks) else list(chunks)
        self._splits: dict[tuple[int, int], Splits] = {}
        self._tiles: dict[int, ChunkTiles] = {}

    def slots_of(self, table: int) -> Slots:
        return Slots(self.slots.positions, self.slots.blocks[table], self.slots.offsets)

    def splits(self, kv_heads: int, window: int) -> Splits:
        key = kv_heads, window
        if key not in self._splits:
            self._splits[key] = split_contexts(self.contexts, kv_heads, self.max_context_len, window)
        return self._splits[key]

    def tiles(self, group: int) -> ChunkTiles:
        if group not in self._tiles:
            self._tiles[group] = tiles_of(self.chunks, group, self.tables.device)
        return self._tiles[group]


class Stack:
    """Layers that `fits` takes, of one dtype and device.

    Between two products there is one launch: what a branch gave is added to the stream where the next norm is computed.
    token_embedding [vocabulary, d], multiplied by `embedding_scale`; position_embedding [positions, d] where positions
    are learned.
    """

    def __init__(
        self,
        token_embedding: Tensor,
        position_embedding: Tensor | None,
        layers: Sequence[OurLayer],
        embedding_scale: float,
    ) -> None:
        self.token_embedding, self.position_embedding = token_embedding, position_embedding
        self.layers, self.embedding_scale = layers, embedding_scale

    def takes(self, kv_caches: Sequence[KvCache], runs: Sequence[AdapterRun]) -> bool:
        """As `backend.Stack` says: what adapters add, and caches in int8, are left to single layers."""
        return not runs and not any(cache.in_int8 or cache.latent for cache in kv_caches)

    def __call__(
        self,
        ids: Tensor,
        slots: Slots,
        tables: Tensor,
        contexts: Tensor,
        decodes: int,
        max_context_len: int,
        chunks: Iterable[ChunkPlace],
        kv_caches: Sequence[KvCache],
        outputs: Sequence[LayerOutputs] | None = None,
        runs: Sequence[AdapterRun] = (),
        drafted: int = 0,
    ) -> Tensor:
        """As `backend.Stack` says; drafts attend as chunks do, but for steps that are captured, which have none."""
        x = F.embedding(ids, self.token_embedding)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.position_embedding is not None:
            x = x + F.embedding(slots.positions, self.position_embedding)
        step = StackStep(slots, tables, contexts, decodes, max_context_len, chunks)
        parts: Parts | None = None
        for i, (layer, cache) in enumerate(zip(self.layers, kv_caches, strict=True)):
            x, normed, *_ = add_norm(x, parts, layer.described.attention_norm, None)
            parts = layer.out.parts(attend(layer, normed, step, cache).flatten(1))
            wanted = OUTPUT_ONLY if outputs is None else outputs[i]
            x, parts = layer.ffn.after(x, parts, layer.described.ffn_norm, wanted)
        return x if parts is None else summed(x, parts, x.dtype)


def attend(layer: OurLayer, x: Tensor, step: StackStep, cache: KvCache) -> Tensor:
    """What attention gives for normed x [T, d], before its output product: [T, heads, size]."""
    own, tokens, size = layer.described, x.shape[0], layer.size
    slots, heads = step.slots_of(own.table), own.heads
    weight = layer.qkv.weight
    if own.qk_norm is None and fused(*x.shape) and qkv.projects(size, own.cos_sin_cache):
        assert isinstance(weight, Tensor)
        q = qkv.project(x, weight, layer.qkv.bias, heads, own.cos_sin_cache, slots, cache)
    else:
        rows = layer.qkv(x).view(tokens, heads + 2 * own.kv_heads, size)
        qkv.store_kv(rows, heads, own.cos_sin_cache, slots, cache, own.qk_norm)
        q = rows[:, :heads]
    out = torch.empty(tokens, heads, size, dtype=x.dtype, device=x.device)
    n, tables, scale = step.decodes, step.tables[own.table], size**-0.5
    if n:
        splits = step.splits(own.kv_heads, own.scope.window)
        attention.attend_into(out[:n], q[:n], cache, tables[:n], step.contexts, splits, scale, own.scope)
    if step.chunks:
        chunk_attention(q, cache, tables, step.tiles(heads // own.kv_heads), out, scale, own.scope)
    return out
