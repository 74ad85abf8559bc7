"""The decoder: embeddings, layers of attention and an FFN, each of its kind, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.backend import Adapter
from dsc_kernels.memory import zeros
from dsc_kernels.weights import (
    OUTPUT_ONLY,
    Adapted,
    DecoderLayer,
    KvCache,
    LowRank,
    Module,
    NormWeights,
    Place,
    QkNorm,
)
from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.attention import Attention
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.ffn import KINDS, Ffn, Shapes
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.ffn.picks import PickingFfn, Picks, picking_layers
from dsc_serve.model.layer_groups import layer_groups
from dsc_serve.model.origin import Origin
from dsc_serve.model.rope import Angles, RopeTable

Branch = Callable[..., Tensor]  # an FFN: x [T, d] and a residual → [T, d]
# By `norms` of a layer the names of attention's norm and the FFN's, which may be one.
NORM_NAMES = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "shared": ("input_layernorm", "input_layernorm"),
    "around": ("input_layernorm", "pre_feedforward_layernorm"),
}
# Where norms stand around branches those of what attention and the FFN give.
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")


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
        for name, size in projections(config).items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, d)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, config.num_attention_heads * config.value_size)
        if config.attention_output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (d,)
        if kind.qk_norm == "latent":
            shapes[f"{layer}.self_attn.k_norm.weight"] = (kind.value_size,)
        elif kind.qk_norm != "none":
            sizes = (kind.head_dim,) * 2 if kind.qk_norm == "head" else (kind.query_size, kind.kv_size)
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (n,) for name, n in zip("qk", sizes, strict=True)}
        shapes |= norm(f"{layer}.{second}")  # after attention's: the order is that in which weights are drawn
        if kind.norms == "around":
            shapes |= norm(f"{layer}.{BEHIND[0]}") | norm(f"{layer}.{BEHIND[1]}")
        ffn = KINDS[kind.ffn.kind].shapes(kind)
        shapes |= {f"{layer}.mlp.{name}": shape for name, shape in ffn.items()}
    shapes |= norm("model.norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def projections(config: ModelConfig) -> dict[str, int]:
    """The rows of the projections to queries, keys and, where they do not lie within these, values."""
    values = {} if config.latent_size is not None else {"v": config.kv_size}
    return {"q": config.query_size, "k": config.kv_size, **values}


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
    """One layer; `config.norms` says where its norms stand. norm1 belongs to attention, norm2 to the FFN.

    behind: the norms of what these give, where norms stand around branches. index: of the layer.
    """

    def __init__(
        self,
        norm1: Norm,
        attention: Attention,
        norm2: Norm,
        ffn: Ffn,
        index: int,
        behind: tuple[Norm, Norm] | None = None,
    ) -> None:
        self.norm1, self.attention, self.norm2, self.ffn, self.index = norm1, attention, norm2, ffn, index
        self.behind = behind
        self._run = ARRANGEMENTS[attention.config.norms]

    def __call__(self, x: Tensor, batch: StepBatch, cache: KvCache) -> Tensor:
        """x [T, d] → [T, d]."""
        return self._run(self, x, batch, cache, self._adapted(batch), self.ffn)

    def picking(
        self, x: Tensor, batch: StepBatch, cache: KvCache, ffn: PickingFfn | None, picks: list[Picks]
    ) -> Tensor:
        """The same; what its FFN picked, which is given again where it picks anything, is appended."""
        if ffn is None:
            return self(x, batch, cache)

        def recorded(x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
            out, picked = ffn.routed(x, residual, adapted=adapted)
            picks.append(picked)
            return out

        return self._run(self, x, batch, cache, self._adapted(batch), recorded)

    def _adapted(self, batch: StepBatch) -> Adapted | None:
        return Adapted(batch.runs, self.index) if batch.runs else None

    def described(self) -> DecoderLayer:
        """What it consists of, for those who compute all blocks in one call."""
        c = self.attention.config
        attended, fed = (None, None) if self.behind is None else (norm.weights for norm in self.behind)
        return DecoderLayer(
            norms=c.norms,
            attention_norm=self.norm1.weights,
            attended_norm=attended,
            fed_norm=fed,
            size=c.head_dim,
            scope=self.attention.scope,
            table=self.attention.group,
            qkv=self.attention.qkv,
            out=self.attention.out,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            qk_norm=self.attention.qk_norm,
            cos_sin_cache=self.attention.cos_sin_cache,
            ffn_norm=self.norm2.weights,
            ffn=self.ffn.layer,
        )


Arrangement = Callable[[TransformerLayer, Tensor, StepBatch, KvCache, Adapted | None, Branch], Tensor]


def norms_before(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    x = layer.attention(layer.norm1(x), batch, cache, x, adapted)
    return ffn(layer.norm2(x), residual=x, adapted=adapted)


def norms_after(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    x = layer.norm1(layer.attention(x, batch, cache, None, adapted), residual=x)
    return layer.norm2(ffn(x, adapted=adapted), residual=x)


def parallel(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    attended = layer.attention(layer.norm1(x), batch, cache, x, adapted)
    return ffn(layer.norm2(x), residual=attended, adapted=adapted)


def parallel_shared(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    normed = layer.norm1(x)
    return ffn(normed, residual=layer.attention(normed, batch, cache, x, adapted), adapted=adapted)


def around(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    assert layer.behind is not None
    attended, fed = layer.behind
    x = attended(layer.attention(layer.norm1(x), batch, cache, None, adapted), residual=x)
    return fed(ffn(layer.norm2(x), adapted=adapted), residual=x)


ARRANGEMENTS: dict[str, Arrangement] = {
    "before": norms_before,
    "after": norms_after,
    "parallel": parallel,
    "shared": parallel_shared,
    "around": around,
}


class Decoder:
    """A decoder whose weights lie ready on one device, in the dtype it computes in.

    tensors: as `tensor_shapes` names them, checked; each is asked for once, so that they need not exist together.
    origin: the family's form that they were brought from, for adapters of that form.
    """

    origin: Origin | None = None

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.modules = modules_of(config)

        def put(name: str) -> Tensor:
            return tensors[name].to(device=device, dtype=dtype)

        def norm(name: str) -> Norm:
            return Norm(config, put(f"{name}.weight"), put(f"{name}.bias") if config.norm_type == "layernorm" else None)

        self.embedding = put("model.embed_tokens.weight")
        learned = config.position_embedding_type == "learned"
        self.positions = put("model.embed_positions.weight") if learned else None
        self.groups = layer_groups(config)
        self.ropes: dict[str, RopeTable] = {}
        for kind in [] if learned else config.kinds:
            angles = Angles(kind.turned, kind.max_position_embeddings, kind.rope_theta, kind.rope_scaling)
            if kind.rotation and str(angles) not in self.ropes:
                self.ropes[str(angles)] = RopeTable(*angles, device)
        self.layers = []
        for i, kind in enumerate(config.layers):
            layer = f"model.layers.{i}"
            angles = Angles(kind.turned, kind.max_position_embeddings, kind.rope_theta, kind.rope_scaling)
            cos_sin_cache = self.ropes[str(angles)].table if kind.rotation and not learned else None
            weights = attention_weights(kind, f"{layer}.self_attn.", put)
            attention = Attention(kind, cos_sin_cache, *weights, group=self.groups.group[i])
            prefix = f"{layer}.mlp."
            own = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
            try:
                ffn = KINDS[kind.ffn.kind](kind, own, dtype, device)
            except CheckpointError as error:
                raise CheckpointError(f"{prefix}{error}") from None
            norms = {name: norm(f"{layer}.{name}") for name in dict.fromkeys(NORM_NAMES[kind.norms])}
            first, second = (norms[name] for name in NORM_NAMES[kind.norms])
            behind = None
            if kind.norms == "around":
                behind = norm(f"{layer}.{BEHIND[0]}"), norm(f"{layer}.{BEHIND[1]}")
            self.layers.append(TransformerLayer(first, attention, second, ffn, i, behind))
        self.stack = ops.stack(
            self.embedding,
            self.positions,
            [layer.described() for layer in self.layers],
            config.embedding_scale,
        )
        picking = picking_layers(config)[1]
        self._picking: list[PickingFfn | None] = [  # None: the layer picks nothing, or nothing that can be told
            layer.ffn if i in picking else None  # type: ignore[misc]  # the FFN kinds that pick can tell what
            for i, layer in enumerate(self.layers)
        ]
        self._dsc = dsc_layers(self)
        self.norm = norm("model.norm")
        self.head = ops.head(self.embedding if config.tie_word_embeddings else put("lm_head.weight"))

    def kv_caches(self, blocks: int, block_size: int) -> list[KvCache]:
        """One per layer, of so many blocks, all zero; layers of the same place in other groups share theirs."""
        latent = self.config.latent_size
        shape = (blocks, self.config.num_key_value_heads, block_size, self.config.head_dim)

        def part() -> Tensor:
            return zeros(shape, self.dtype, self.device)

        def cache() -> KvCache:
            return KvCache(part(), part()) if latent is None else KvCache.within(part(), latent)

        places = [cache() for _ in range(self.groups.size)]
        return [places[place] for place in self.groups.place]

    def hidden(self, batch: StepBatch, kv_caches: Sequence[KvCache], picks: list[Picks] | None = None) -> Tensor:
        """The layers' output [T, d] for a step, before the final norm; its keys and values are written to the caches.

        picks: where given, those of each layer that picks anything are appended to it.
        """
        for rope in self.ropes.values():
            rope.reach(batch.longest)
        if self.stack is not None:
            return self._stacked(self.stack, batch, kv_caches, picks)
        x = F.embedding(batch.token_ids, self.embedding)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + F.embedding(batch.positions, self.positions)
        for layer, ffn, cache in zip(self.layers, self._picking, kv_caches, strict=True):
            x = layer(x, batch, cache) if picks is None else layer.picking(x, batch, cache, ffn, picks)
        return x

    def _stacked(
        self,
        stack: ops.Stack,
        batch: StepBatch,
        kv_caches: Sequence[KvCache],
        picks: list[Picks] | None,
    ) -> Tensor:
        b, tokens, outputs = batch, batch.token_ids.shape[0], None
        if picks is not None or self._dsc:  # else nothing but the output is ever asked of them
            reporting = picks is not None
            outputs = [OUTPUT_ONLY if ffn is None else ffn.outputs(tokens, reporting) for ffn in self._picking]
        contexts = b.context_lens, b.decodes, b.decode_context, b.chunks
        x = stack(b.token_ids, b.slots, b.block_tables, *contexts, kv_caches, outputs, b.runs)
        if picks is not None and outputs is not None:
            both = zip(self._picking, outputs, strict=True)
            picks += [ffn.record(own.picked) for ffn, own in both if ffn is not None]
        return x

    def adapter(self, updates: Mapping[Place, LowRank]) -> Adapter:
        """Updates of its modules, as `StepBatch.runs` takes them. Raises ValueError for what does not fit."""
        return ops.adapter(updates, self.modules, self.dtype, self.device)

    def summed(self, parts: Sequence[tuple[Adapter, float]]) -> Adapter:
        """Such adapters with weights as one; it holds their memory."""
        return ops.summed(parts, self.dtype, self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [R, vocabulary] of rows [R, d] of `hidden`."""
        logits, cap = self.head(self.norm(hidden), out_dtype=torch.float32), self.config.logits_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def argmax_tokens(self, hidden: Tensor) -> Tensor:
        """The tokens int64 [R] with the largest logits of rows [R, d] of `hidden`."""
        return self.head.argmax(self.norm(hidden))


def attention_weights(
    config: ModelConfig, prefix: str, put: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, QkNorm | None]:
    """What `Attention` consists of, in its order, from the tensors below a prefix."""

    def joined(part: str) -> Tensor:
        return torch.cat([put(f"{prefix}{name}_proj.{part}") for name in projections(config)])

    qkv_bias = joined("bias") if config.attention_bias else None
    out_bias = put(f"{prefix}o_proj.bias") if config.attention_output_bias else None
    qk_norm = None
    if config.qk_norm == "latent":
        qk_norm = QkNorm(None, put(f"{prefix}k_norm.weight"), config.norm_eps)
    elif config.qk_norm != "none":
        qk_norm = QkNorm(put(f"{prefix}q_norm.weight"), put(f"{prefix}k_norm.weight"), config.norm_eps)
    return joined("weight"), put(f"{prefix}o_proj.weight"), qkv_bias, out_bias, qk_norm


def modules_of(config: ModelConfig) -> list[dict[str, Module]]:
    """By layer, what adapters may add to, each where it stands in its product."""
    modules: list[dict[str, Module]] = [{} for _ in config.layers]
    for (layer, name), shape in module_shapes(config).items():
        at = {"k": config.query_size, "v": config.query_size + config.kv_size}.get(name, 0)
        modules[layer][name] = Module(*shape, at)
    return modules


def dsc_layers(model: Decoder) -> list[DscFfn]:
    """The DSC layers of a model, in order."""
    return [layer.ffn for layer in model.layers if isinstance(layer.ffn, DscFfn)]
