"""The decoder: embeddings, layers of attention and an FFN, each of its kind, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.memory import zeros
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import SCALE_BYTES, DecoderLayer, KvCache, NormWeights, QkNorm
from dsc_serve.model.attention import Attention
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.ffn import KINDS, Ffn, Shapes
from dsc_serve.model.ffn.dsc import DscFfn, Picks
from dsc_serve.model.placement import Placement
from dsc_serve.model.quantised_tensor import joined
from dsc_serve.model.rope import RopeTable
from dsc_serve.weight_forms import AS_STORED, Forms

Branch = Callable[..., Tensor]  # an FFN: x [T, d] and a residual → [T, d]
# By `norms` of a layer the names of attention's norm and the FFN's, which may be one.
NORM_NAMES = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "shared": ("input_layernorm", "input_layernorm"),
}


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor that a checkpoint of this configuration stores."""
    d = config.hidden_size

    def norm(name: str) -> Shapes:
        parts = ("weight", "bias") if config.norm_type == "layernorm" else ("weight",)
        return {f"{name}.{part}": (d,) for part in parts}

    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, d)}
    if config.position_embedding_type == "learned":
        shapes["model.embed_positions.weight"] = (config.max_position_embeddings, d)
    for i, kind in enumerate(config.layers):
        layer = f"model.layers.{i}"
        first, second = NORM_NAMES[kind.norms]
        shapes |= norm(f"{layer}.{first}")
        for name, size in (("q", config.query_size), ("k", config.kv_size), ("v", config.kv_size)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, d)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, config.query_size)
        if config.attention_output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (d,)
        if kind.qk_norm != "none":
            sizes = (kind.head_dim,) * 2 if kind.qk_norm == "head" else (kind.query_size, kind.kv_size)
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (n,) for name, n in zip("qk", sizes, strict=True)}
        shapes |= norm(f"{layer}.{second}")  # after attention's: the order is that in which weights are drawn
        ffn = KINDS[kind.ffn.kind].shapes(kind)
        shapes |= {f"{layer}.mlp.{name}": shape for name, shape in ffn.items()}
    shapes |= norm("model.norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Total parameters, and those that one token uses."""
    total = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    return total, total - sum(KINDS[kind.ffn.kind].idle_parameters(kind) for kind in config.layers)


class Norm:
    """LayerNorm or RMSNorm over the last dimension, plus a residual where one is given; statistics in float32."""

    def __init__(self, config: ModelConfig, weight: Tensor, bias: Tensor | None) -> None:
        self.weights = NormWeights(weight, bias, config.norm_eps)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.norm(x, self.weights, residual)


class TransformerLayer:
    """One layer; `config.norms` says where its norms stand. norm1 belongs to attention, norm2 to the FFN."""

    def __init__(self, norm1: Norm, attention: Attention, norm2: Norm, ffn: Ffn) -> None:
        self.norm1, self.attention, self.norm2, self.ffn = norm1, attention, norm2, ffn
        self._run = ARRANGEMENTS[attention.config.norms]

    def __call__(self, x: Tensor, batch: StepBatch, cache: KvCache) -> Tensor:
        """x [T, d] → [T, d]."""
        return self._run(self, x, batch, cache, self.ffn)

    def picking(self, x: Tensor, batch: StepBatch, cache: KvCache, picks: list[Picks]) -> Tensor:
        """The same, where the FFN is DSC's; what it picked is appended."""
        ffn = self.ffn
        assert isinstance(ffn, DscFfn)

        def recorded(x: Tensor, residual: Tensor | None = None) -> Tensor:
            out, picked = ffn.routed(x, residual)
            picks.append(picked)
            return out

        return self._run(self, x, batch, cache, recorded)

    def described(self) -> DecoderLayer:
        """What it consists of, for those who compute all blocks in one call."""
        c = self.attention.config
        return DecoderLayer(
            norms=c.norms,
            attention_norm=self.norm1.weights,
            qkv=self.attention.qkv,
            out=self.attention.out,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            qk_norm=self.attention.qk_norm,
            cos_sin_cache=self.attention.cos_sin_cache,
            ffn_norm=self.norm2.weights,
            ffn=self.ffn.layer,
        )


def norms_before(layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, ffn: Branch) -> Tensor:
    x = layer.attention(layer.norm1(x), batch, cache, residual=x)
    return ffn(layer.norm2(x), residual=x)


def norms_after(layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, ffn: Branch) -> Tensor:
    x = layer.norm1(layer.attention(x, batch, cache, residual=None), residual=x)
    return layer.norm2(ffn(x), residual=x)


def parallel(layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, ffn: Branch) -> Tensor:
    return ffn(layer.norm2(x), residual=layer.attention(layer.norm1(x), batch, cache, residual=x))


def parallel_shared(layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, ffn: Branch) -> Tensor:
    normed = layer.norm1(x)
    return ffn(normed, residual=layer.attention(normed, batch, cache, residual=x))


ARRANGEMENTS: dict[str, Callable[[TransformerLayer, Tensor, StepBatch, KvCache, Branch], Tensor]] = {
    "before": norms_before,
    "after": norms_after,
    "parallel": parallel,
    "shared": parallel_shared,
}


class Decoder:
    """A decoder whose weights lie ready on one device, in the dtype it computes in.

    tensors: as `tensor_shapes` names them, checked; each is asked for once, so that they need not exist together.
    forms: of the weights by parts of the model. held: the bytes of weights by their form.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Weight],
        dtype: torch.dtype,
        device: torch.device,
        forms: Forms = AS_STORED,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        place = Placement(dtype, device, forms)
        self.held = place.held

        embedding = place.weight("embedding", tensors["model.embed_tokens.weight"])
        learned = config.position_embedding_type == "learned"
        self.positions = place.tensor(tensors["model.embed_positions.weight"]) if learned else None
        self.rope = rotary_table(config, device)
        self.layers = [
            transformer_layer(kind, f"model.layers.{i}", tensors, place, self.rope)
            for i, kind in enumerate(config.layers)
        ]
        self.stack = ops.stack(embedding, self.positions, [layer.described() for layer in self.layers])
        # A stack owns what it looks words up in; floating point stays, for those who compute layer by layer.
        self.embedding = embedding if self.stack is None or isinstance(embedding, Tensor) else None
        self.norm = placed_norm(config, "model.norm", tensors, place)
        tied = config.tie_word_embeddings
        self.head = ops.head(embedding if tied else place.weight("head", tensors["lm_head.weight"]))

    def kv_caches(self, blocks: int, block_size: int, int8: bool = False) -> list[KvCache]:
        """One per layer, of so many blocks, all zero; in the dtype that is computed in, or in int8."""
        width = self.config.head_dim + (SCALE_BYTES if int8 else 0)
        shape = (blocks, self.config.num_key_value_heads, block_size, width)

        def part() -> Tensor:
            return zeros(shape, torch.int8 if int8 else self.dtype, self.device)

        return [KvCache(part(), part()) for _ in self.layers]

    def kv_bytes(self, int8: bool = False) -> int:
        """What a token takes in all layers' caches."""
        row = self.config.head_dim + SCALE_BYTES if int8 else self.config.head_dim * self.dtype.itemsize
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * row

    def hidden(self, batch: StepBatch, kv_caches: Sequence[KvCache], picks: list[Picks] | None = None) -> Tensor:
        """The layers' output [T, d] for a step, before the final norm; its keys and values are written to the caches.

        picks: where given, those of each layer, which must be DSC, are appended to it.
        """
        if self.rope is not None:
            self.rope.reach(batch.longest)
        if self.stack is not None:
            return self._stacked(self.stack, batch, kv_caches, picks)
        assert self.embedding is not None
        x = ops.embed(self.embedding, batch.token_ids)
        if self.positions is not None:
            x = x + F.embedding(batch.positions, self.positions)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, batch, cache) if picks is None else layer.picking(x, batch, cache, picks)
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


def rotary_table(config: ModelConfig, device: torch.device) -> RopeTable | None:
    """The angles of all positions, None where positions are learned."""
    c = config
    if c.position_embedding_type == "learned":
        return None
    return RopeTable(c.turned, c.max_position_embeddings, c.rope_theta, c.rope_scaling, device)


def placed_norm(config: ModelConfig, name: str, tensors: Mapping[str, Weight], place: Placement) -> Norm:
    bias = place.tensor(tensors[f"{name}.bias"]) if config.norm_type == "layernorm" else None
    return Norm(config, place.tensor(tensors[f"{name}.weight"]), bias)


def transformer_layer(
    kind: ModelConfig, name: str, tensors: Mapping[str, Weight], place: Placement, rope: RopeTable | None
) -> TransformerLayer:
    """The layer of the tensors below a name, which is of this kind. Raises CheckpointError."""
    cos_sin_cache = rope.table if rope is not None and kind.rotation else None
    attention = Attention(kind, cos_sin_cache, *attention_weights(kind, f"{name}.self_attn.", tensors, place))
    prefix = f"{name}.mlp."
    own = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
    try:
        ffn = KINDS[kind.ffn.kind](kind, own, place)
    except CheckpointError as error:
        raise CheckpointError(f"{prefix}{error}") from None
    places = NORM_NAMES[kind.norms]
    norms = {norm: placed_norm(kind, f"{name}.{norm}", tensors, place) for norm in dict.fromkeys(places)}
    first, second = (norms[norm] for norm in places)
    return TransformerLayer(first, attention, second, ffn)


def attention_weights(
    config: ModelConfig, prefix: str, tensors: Mapping[str, Weight], place: Placement
) -> tuple[Weight, Weight, Tensor | None, Tensor | None, QkNorm | None]:
    """What `Attention` consists of, in its order, from the tensors below a prefix."""

    def put(name: str) -> Tensor:
        return place.tensor(tensors[f"{prefix}{name}"])

    def weight(name: str) -> Weight:
        return place.weight("attention", tensors[f"{prefix}{name}_proj.weight"])

    qkv_bias = torch.cat([put(f"{p}_proj.bias") for p in "qkv"]) if config.attention_bias else None
    out_bias = put("o_proj.bias") if config.attention_output_bias else None
    qk_norm = None
    if config.qk_norm != "none":
        qk_norm = QkNorm(put("q_norm.weight"), put("k_norm.weight"), config.norm_eps)
    return joined([weight(p) for p in "qkv"], place.dtype), weight("o"), qkv_bias, out_bias, qk_norm


def dsc_layers(model: Decoder) -> list[DscFfn]:
    """The DSC layers of a model, in order."""
    return [layer.ffn for layer in model.layers if isinstance(layer.ffn, DscFfn)]
