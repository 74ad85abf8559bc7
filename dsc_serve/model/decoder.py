"""The decoder: embeddings, pre-norm layers of attention and a configured FFN kind, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.memory import zeros
from dsc_kernels.weights import DecoderLayer, KvCache, NormWeights
from dsc_serve.model.attention import Attention
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.ffn import KINDS, Ffn, Shapes
from dsc_serve.model.ffn.dsc import DscFfn, Picks
from dsc_serve.model.rope import RopeTable


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor that a checkpoint of this configuration stores."""
    d = config.hidden_size

    def norm(name: str) -> Shapes:
        parts = ("weight", "bias") if config.norm_type == "layernorm" else ("weight",)
        return {f"{name}.{part}": (d,) for part in parts}

    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, d)}
    if config.position_embedding_type == "learned":
        shapes["model.embed_positions.weight"] = (config.max_position_embeddings, d)
    ffn = KINDS[config.ffn.kind].shapes(config)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= norm(f"{layer}.input_layernorm")
        for name, size in (("q", config.query_size), ("k", config.kv_size), ("v", config.kv_size)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, d)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, config.query_size)
        if config.attention_output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (d,)
        shapes |= norm(f"{layer}.post_attention_layernorm")
        shapes |= {f"{layer}.mlp.{name}": shape for name, shape in ffn.items()}
    shapes |= norm("model.norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Total parameters, and those that one token uses."""
    total = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    return total, total - config.num_hidden_layers * KINDS[config.ffn.kind].idle_parameters(config)


class Norm:
    """LayerNorm or RMSNorm over the last dimension; statistics in float32."""

    def __init__(self, config: ModelConfig, weight: Tensor, bias: Tensor | None) -> None:
        self.weights = NormWeights(weight, bias, config.norm_eps)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.weights)


class TransformerLayer:
    def __init__(self, norm1: Norm, attention: Attention, norm2: Norm, ffn: Ffn) -> None:
        self.norm1, self.attention, self.norm2, self.ffn = norm1, attention, norm2, ffn

    def described(self) -> DecoderLayer:
        """What it consists of, for those who compute all blocks in one call."""
        c = self.attention.config
        return DecoderLayer(
            attention_norm=self.norm1.weights,
            qkv=self.attention.qkv,
            out=self.attention.out,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            cos_sin_cache=self.attention.cos_sin_cache,
            ffn_norm=self.norm2.weights,
            ffn=self.ffn.layer,
        )


class Decoder:
    """A decoder whose weights lie ready on one device, in the dtype it computes in.

    tensors: as `tensor_shapes` names them, checked; each is asked for once, so that they need not exist together.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device

        def put(name: str) -> Tensor:
            return tensors[name].to(device=device, dtype=dtype)

        def norm(name: str) -> Norm:
            return Norm(config, put(f"{name}.weight"), put(f"{name}.bias") if config.norm_type == "layernorm" else None)

        self.embedding = put("model.embed_tokens.weight")
        learned = config.position_embedding_type == "learned"
        self.positions = put("model.embed_positions.weight") if learned else None
        c = config
        self.rope = (
            None if learned else RopeTable(c.head_dim, c.max_position_embeddings, c.rope_theta, c.rope_scaling, device)
        )
        cos_sin_cache = None if self.rope is None else self.rope.table
        self.layers = []
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            attention = Attention(config, cos_sin_cache, *self._attention_weights(f"{layer}.self_attn.", put))
            prefix = f"{layer}.mlp."
            own = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
            try:
                ffn = KINDS[config.ffn.kind](config, own, dtype, device)
            except CheckpointError as error:
                raise CheckpointError(f"{prefix}{error}") from None
            norms = norm(f"{layer}.input_layernorm"), norm(f"{layer}.post_attention_layernorm")
            self.layers.append(TransformerLayer(norms[0], attention, norms[1], ffn))
        self.stack = ops.stack(
            self.embedding,
            self.positions,
            [layer.described() for layer in self.layers],
        )
        self.norm = norm("model.norm")
        self.head = ops.head(self.embedding if config.tie_word_embeddings else put("lm_head.weight"))

    def _attention_weights(
        self, prefix: str, put: Callable[[str], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        def joined(part: str) -> Tensor:
            return torch.cat([put(f"{prefix}{p}_proj.{part}") for p in "qkv"])

        c = self.config
        qkv_bias = joined("bias") if c.attention_bias else None
        out_bias = put(f"{prefix}o_proj.bias") if c.attention_output_bias else None
        return joined("weight"), put(f"{prefix}o_proj.weight"), qkv_bias, out_bias

    def kv_caches(self, blocks: int, block_size: int) -> list[KvCache]:
        """One per layer, of so many blocks, all zero."""
        shape = (blocks, self.config.num_key_value_heads, block_size, self.config.head_dim)

        def part() -> Tensor:
            return zeros(shape, self.dtype, self.device)

        return [KvCache(part(), part()) for _ in self.layers]

    def hidden(self, batch: StepBatch, kv_caches: Sequence[KvCache], picks: list[Picks] | None = None) -> Tensor:
        """The layers' output [T, d] for a step, before the final norm; its keys and values are written to the caches.

        picks: where given, those of each layer, which must be DSC, are appended to it.
        """
        if self.rope is not None:
            self.rope.reach(batch.longest)
        if self.stack is not None:
            return self._stacked(self.stack, batch, kv_caches, picks)
        x = F.embedding(batch.token_ids, self.embedding)
        if self.positions is not None:
            x = x + F.embedding(batch.positions, self.positions)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            x = layer.attention(layer.norm1(x), batch, cache, residual=x)
            if picks is None:
                x = layer.ffn(layer.norm2(x), residual=x)
            else:
                assert isinstance(layer.ffn, DscFfn)
                x, picked = layer.ffn.routed(layer.norm2(x), residual=x)
                picks.append(picked)
        return x

    def _stacked(
        self,
        stack: ops.Stack,
        batch: StepBatch,
        kv_caches: Sequence[KvCache],
        picks: list[Picks] | None,
    ) -> Tensor:
        b, layers = batch, dsc_layers(self)
        outputs = [layer.outputs(b.token_ids.shape[0], picks is not None) for layer in layers]
        contexts = b.context_lens, b.decodes, b.decode_context, b.chunks
        x = stack(b.token_ids, b.slots, b.block_tables, *contexts, kv_caches, outputs or None)
        if picks is not None:
            picks += [layer.record(own.picked) for layer, own in zip(layers, outputs, strict=True)]
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [R, vocabulary] of rows [R, d] of `hidden`."""
        return self.head(self.norm(hidden), out_dtype=torch.float32)

    def argmax_tokens(self, hidden: Tensor) -> Tensor:
        """The tokens int64 [R] with the largest logits of rows [R, d] of `hidden`."""
        return self.head.argmax(self.norm(hidden))


def dsc_layers(model: Decoder) -> list[DscFfn]:
    """The DSC layers of a model, in order."""
    return [layer.ffn for layer in model.layers if isinstance(layer.ffn, DscFfn)]
