"""The decoder: embeddings, layers of attention and an FFN, each of its kind, final norm and head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.backend import Basis, BoundAdapter
from dsc_kernels.memory import zeros
from dsc_kernels.quantised import ActivationBits, Weight
from dsc_kernels.weights import (
    ATOMS,
    NOT_TUNED,
    OUTPUT_ONLY,
    SCALE_BYTES,
    KvCache,
    Module,
    Pair,
    Place,
    QkNorm,
    Tuning,
    Update,
)
from dsc_serve.model.adapter import BankTenant, module_shapes
from dsc_serve.model.attention import Attention
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import CheckpointError, DscConfig, ModelConfig
from dsc_serve.model.exchange import ALONE, RankExchange
from dsc_serve.model.ffn import KINDS
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.ffn.picks import PickingFfn, Picks, picking_layers
from dsc_serve.model.ffn.sharded import SHARDED
from dsc_serve.model.layer_groups import layer_groups, token_bytes
from dsc_serve.model.origin import Origin
from dsc_serve.model.placement import Placement
from dsc_serve.model.quantised_tensor import joined
from dsc_serve.model.rope import Angles, RopeTable
from dsc_serve.model.sharding import rank_config, rank_tensors
from dsc_serve.model.summed import SummedLinear
from dsc_serve.model.tensor_shapes import BEHIND, NORM_NAMES, projections
from dsc_serve.model.tensor_shapes import parameter_counts as parameter_counts
from dsc_serve.model.tensor_shapes import tensor_shapes as tensor_shapes
from dsc_serve.model.transformer_layer import Norm, TransformerLayer
from dsc_serve.weight_forms import AS_STORED, Forms


class Decoder:
    """A decoder whose weights lie ready on one device, in the dtype it computes in.

    tensors: as `tensor_shapes` names them, checked; each is asked for once, so that they need not exist together.
    origin: the family's form that they were brought from, for adapters of that form.
    forms: of the weights by parts of the model. held: the bytes of weights by their form.
    embedding_bytes: of these, those of an embedding that is not the head, too. exchange: with ranks that share
    the model, each with its part of every layer (`sharding`), of tensors and of caches; config is the whole one.
    """

    origin: Origin | None = None

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Weight],
        dtype: torch.dtype,
        device: torch.device,
        forms: Forms = AS_STORED,
        activation_bits: ActivationBits = 16,
        exchange: RankExchange = ALONE,
    ) -> None:
        self.config, self.dtype, self.device, self.shard = config, dtype, device, exchange.shard
        self._own_config = rank_config(config, self.shard)  # of its layers, and of what it keeps of a token
        self.modules = modules_of(config)
        tensors = rank_tensors(config, tensors, self.shard)
        place = Placement(dtype, device, forms, activation_bits, exchange)
        self.held = place.held

        embedding = place.weight("embedding", tensors["model.embed_tokens.weight"])
        learned = config.position_embedding_type == "learned"
        self.positions = place.tensor(tensors["model.embed_positions.weight"]) if learned else None
        self.groups = layer_groups(config)
        self.ropes = rotary_tables(config, device)
        self.layers = [
            transformer_layer(kind, i, tensors, place, self.ropes, self.groups.group[i])
            for i, kind in enumerate(config.layers)
        ]
        self.stack = self._described(embedding) if self.shard.size == 1 else None  # ranks exchange between its parts
        # A stack owns what it looks words up in; floating point stays, for those who compute layer by layer.
        self.embedding = embedding if self.stack is None or isinstance(embedding, Tensor) else None
        picking = picking_layers(config)[1]
        self._picking: list[PickingFfn | None] = [  # None: the layer picks nothing, or nothing that can be told
            layer.ffn if i in picking else None  # type: ignore[misc]  # the FFN kinds that pick can tell what
            for i, layer in enumerate(self.layers)
        ]
        self._dsc = dsc_layers(self)
        self.norm = placed_norm(config, "model.norm", tensors, place)
        tied = config.tie_word_embeddings
        head = embedding if tied else place.weight("head", tensors["lm_head.weight"])
        self.embedding_bytes = 0 if tied else embedding.nbytes
        with told_of("model.embed_tokens" if tied else "lm_head"):
            self.head = ops.head(head)

    def _described(self, embedding: Weight) -> ops.Stack | None:
        described = [layer.described() for layer in self.layers]
        with told_of("model"):
            return ops.stack(embedding, self.positions, described, self.config.embedding_scale)

    def kv_caches(self, blocks: int, block_size: int, int8: bool = False) -> list[KvCache]:
        """One per layer, of so many blocks, all zero; layers of the same place in other groups share theirs.

        In the dtype that is computed in, or in int8.
        """
        latent = self.config.latent_size
        width = self.config.head_dim + (SCALE_BYTES if int8 else 0)
        shape = (blocks, self._own_config.num_key_value_heads, block_size, width)

        def part() -> Tensor:
            return zeros(shape, torch.int8 if int8 else self.dtype, self.device)

        def cache() -> KvCache:
            return KvCache(part(), part()) if latent is None else KvCache.within(part(), latent)

        caches = [cache() for _ in range(self.groups.size)]
        return [caches[place] for place in self.groups.place]

    def kv_bytes(self, int8: bool = False) -> int:
        """What a token takes in the blocks of all groups, while none is behind a window."""
        return len(self.groups.windows) * self.group_bytes(int8)

    def group_bytes(self, int8: bool = False) -> int:
        """What a token takes in a block of one group."""
        return token_bytes(self._own_config, self.dtype.itemsize, int8)

    def hidden(self, batch: StepBatch, kv_caches: Sequence[KvCache], picks: list[Picks] | None = None) -> Tensor:
        """The layers' output [T, d] for a step, before the final norm; its keys and values are written to the caches.

        picks: where given, those of each layer that picks anything are appended to it.
        """
        for rope in self.ropes.values():
            rope.reach(batch.max_context_len)
        if self.stack is not None and self.stack.takes(kv_caches, batch.runs):
            return self._stacked(self.stack, batch, kv_caches, picks)
        assert self.embedding is not None
        x = ops.embed(self.embedding, batch.token_ids)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + F.embedding(batch.positions, self.positions)
        if picks is None:
            for layer, cache in zip(self.layers, kv_caches, strict=True):
                x = layer(x, batch, cache)
        else:
            for layer, ffn, cache in zip(self.layers, self._picking, kv_caches, strict=True):
                x = layer.picking(x, batch, cache, ffn, picks)
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
        x = stack(b.token_ids, b.slots, b.block_tables, *contexts, kv_caches, outputs, b.runs, b.drafted)
        if picks is not None and outputs is not None:
            both = zip(self._picking, outputs, strict=True)
            picks += [ffn.record(own.picked) for ffn, own in both if ffn is not None]
        return x

    def basis(self, pairs: Mapping[Place, Pair]) -> Basis:
        """What adapters of its modules share. Raises ValueError for what does not fit."""
        return ops.basis(pairs, self.modules, self.dtype, self.device)

    def adapter(
        self, updates: Mapping[Place, Update], basis: Basis | None = None, tenant: BankTenant | None = None
    ) -> BoundAdapter:
        """Updates of its modules, and what a tenant of its bank has, as `StepBatch.runs` takes them.

        Raises ValueError for what does not fit.
        """
        return ops.adapter(updates, self.modules, self.dtype, self.device, basis, self._tunings(tenant))

    def _tunings(self, tenant: BankTenant | None) -> Mapping[int, Tuning]:
        if tenant is None:
            return NOT_TUNED
        own = {layer.index: layer.ffn for layer in self.layers if isinstance(layer.ffn, DscFfn)}
        if len(own) != len(tenant.bias):
            raise ValueError(f"a tenant of {len(tenant.bias)} layers' banks; the model has {len(own)}")
        rows = zip(own.items(), tenant.bias, tenant.gamma, strict=True)
        return {index: ffn.tuning(bias, gamma) for (index, ffn), bias, gamma in rows}

    def summed(self, parts: Sequence[tuple[BoundAdapter, float]]) -> BoundAdapter:
        """Such adapters with weights as one; it holds their memory."""
        return ops.summed(parts, self.dtype, self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [R, vocabulary] of rows [R, d] of `hidden`."""
        logits, cap = self.head(self.norm(hidden), out_dtype=torch.float32), self.config.logits_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def argmax_tokens(self, hidden: Tensor) -> Tensor:
        """The tokens int64 [R] with the largest logits of rows [R, d] of `hidden`."""
        return self.head.argmax(self.norm(hidden))


Ropes = Mapping[str, RopeTable]  # by their angles


def angles_of(kind: ModelConfig) -> Angles | None:
    """Those that layers of a kind turn queries and keys by, None where they turn nothing."""
    if kind.position_embedding_type == "learned" or not kind.rotation:
        return None
    return Angles(kind.turned, kind.max_position_embeddings, kind.rope_theta, kind.rope_scaling)


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """What tensors below a name are refused for, by a layer kind or by kernels, as CheckpointError with the name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}.{error}") from None
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def rotary_tables(config: ModelConfig, device: torch.device) -> Ropes:
    """The angles of all positions, once for all kinds of layers that have the same."""
    angles = {str(own): own for own in map(angles_of, config.kinds) if own is not None}
    return {name: RopeTable(*own, device) for name, own in angles.items()}


def placed_norm(config: ModelConfig, name: str, tensors: Mapping[str, Weight], place: Placement) -> Norm:
    bias = place.tensor(tensors[f"{name}.bias"]) if config.norm_type == "layernorm" else None
    return Norm(config, place.tensor(tensors[f"{name}.weight"]), bias)


def transformer_layer(
    kind: ModelConfig, index: int, tensors: Mapping[str, Weight], place: Placement, ropes: Ropes, group: int = 0
) -> TransformerLayer:
    """The layer of this index, which is of this kind, or a rank's part of it; group: its own, of `LayerGroups`.

    Raises CheckpointError.
    """
    own_kind, shared = rank_config(kind, place.exchange.shard), place.exchange.shard.size > 1
    name, angles = f"model.layers.{index}", angles_of(kind)
    cos_sin_cache = None if angles is None else ropes[str(angles)].table
    weights = attention_weights(own_kind, f"{name}.self_attn.", tensors, place)
    with told_of(f"{name}.self_attn"):
        attention = Attention(own_kind, cos_sin_cache, *weights, group=group)
    if shared:
        attention.out = SummedLinear(attention.out, place.exchange)
    prefix = f"{name}.mlp."
    own = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
    with told_of(f"{name}.mlp"):
        ffn = (SHARDED if shared else KINDS)[kind.ffn.kind](kind, own, place)
    names, around = NORM_NAMES[kind.norms], BEHIND if kind.norms == "around" else ()
    norms = {norm: placed_norm(kind, f"{name}.{norm}", tensors, place) for norm in dict.fromkeys((*names, *around))}
    first, second = (norms[norm] for norm in names)
    behind = (norms[BEHIND[0]], norms[BEHIND[1]]) if around else None
    return TransformerLayer(first, attention, second, ffn, index, behind)


def attention_weights(
    config: ModelConfig, prefix: str, tensors: Mapping[str, Weight], place: Placement
) -> tuple[Weight, Weight, Tensor | None, Tensor | None, QkNorm | None]:
    """What `Attention` consists of, in its order, from the tensors below a prefix."""

    def put(name: str) -> Tensor:
        return place.tensor(tensors[f"{prefix}{name}"])

    def weight(name: str) -> Weight:
        return place.weight("attention", tensors[f"{prefix}{name}_proj.weight"])

    names = projections(config)
    qkv_bias = torch.cat([put(f"{name}_proj.bias") for name in names]) if config.attention_bias else None
    out_bias = put("o_proj.bias") if config.attention_output_bias else None
    qk_norm = None
    if config.qk_norm == "latent":
        qk_norm = QkNorm(None, put("k_norm.weight"), config.norm_eps)
    elif config.qk_norm != "none":
        qk_norm = QkNorm(put("q_norm.weight"), put("k_norm.weight"), config.norm_eps)
    return joined([weight(name) for name in names], place.dtype), weight("o"), qkv_bias, out_bias, qk_norm


def modules_of(config: ModelConfig) -> list[dict[str, Module]]:
    """By layer, what adapters may add to, each where it stands in its product."""
    modules: list[dict[str, Module]] = [{} for _ in config.layers]
    for (layer, name), shape in module_shapes(config).items():
        at = {"k": config.query_size, "v": config.query_size + config.kv_size}.get(name, 0)
        modules[layer][name] = Module(*shape, at)
    for layer, kind in enumerate(config.layers):
        if isinstance(kind.ffn, DscConfig):
            modules[layer][ATOMS] = Module(kind.ffn.num_atoms, config.hidden_size)
    return modules


def dsc_layers(model: Decoder) -> list[DscFfn]:
    """The DSC layers of a model, in order."""
    return [layer.ffn for layer in model.layers if isinstance(layer.ffn, DscFfn)]
