"""What a family of checkpoints is: how its configuration and its tensors become those of the serving form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
ROTARY = Positions()
# Below a layer of the serving form, the modules that a stored one becomes.
Modules = Mapping[str, tuple[str, ...]]
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_MODULES = {
    f"model.layers.{{}}.{name}": (name,)
    for name in (*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
}
SHARED_EXPERT = {
    f"model.layers.{{}}.mlp.shared_expert.{part}_proj": (f"mlp.shared_expert.{part}_proj",)
    for part in ("gate", "up", "down")
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def as_stored(tensors: Mapping[str, Stored], settings: Settings, config: ModelConfig) -> Tensors:
    """The tensors of a family that names and shapes them as the serving form does."""
    return dict(tensors)


@dataclass(frozen=True)
class Architecture:
    """One family.

    fields: those of a ModelConfig, but for `bos_token_id` and `eos_token_id`. Raises CheckpointError naming the field
    that is not supported, its value, and what is.
    tensors: the stored ones under the names and in the shapes of `tensor_shapes`; what is missing or left over is found
    later. Both know Hugging Face's names alone: what reads another form of file translates to these first.
    modules: those linear ones that adapters may change, {} for the layer's number. transposed: whether their matrices
    are stored the other way round.
    """

    fields: Callable[[Settings], Fields]
    tensors: Callable[[Mapping[str, Stored], Settings, ModelConfig], Tensors] = as_stored
    modules: Modules = field(default_factory=lambda: LLAMA_MODULES)
    transposed: bool = False


def activation(s: Settings, field: str, default: str) -> str:
    """The activation that a field names. Raises CheckpointError."""
    name = s.get(field, default=default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        s.refuse(field, name, ", ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def frame(s: Settings, positions: Positions = ROTARY, act: str = "silu") -> Fields:
    """What decoders of gated MLPs and RMSNorm share, Llama above all. act: the activation where the config has none."""
    heads, width = s.get("num_attention_heads"), s.get("hidden_size")
    head_dim = s.get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_dim = width // heads
    return {
        **{name: s.get(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": s.get("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "norm_type": "rmsnorm",
        "norm_eps": s.get("rms_norm_eps", default=1e-6),
        "hidden_act": activation(s, "hidden_act", act),
        "mlp_gated": True,
        "tie_word_embeddings": s.get("tie_word_embeddings", default=False),
        "ffn": dense(s),
        **positions.fields(s, head_dim),
    }


def dense(s: Settings, size: str = "intermediate_size", bias: Any = False) -> Fields:
    return {"kind": "dense", "size": s.get(size), "bias": bias}


WINDOW, KINDS = "sliding_window", ("full_attention", "sliding_attention")


def windowed(s: Settings, fields: Fields, sliding: list[bool], default: int | None = None) -> Fields:
    """Fields of a model whose layers see a window only where `sliding` says so. Raises CheckpointError.

    default: the window where the config does not name the field; null is none.
    """
    value = s.content.get(WINDOW, default)
    if value is None or not any(sliding):
        return fields
    return by_layer(fields, {"window": s.size(WINDOW, default=default)}, sliding)


def sliding_layers(s: Settings, otherwise: Callable[[int], bool]) -> list[bool]:
    """Which layers see a window only: as `layer_types` says, or without it `otherwise` of a layer's number."""
    layers, kinds = s.layers(), s.get("layer_types")
    if kinds is None:
        return [otherwise(layer) for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in KINDS for kind in kinds):
        s.refuse("layer_types", kinds, f"a list of {layers} names, each {' or '.join(KINDS)}")
    return [kind == KINDS[1] for kind in kinds]


def later_layers(s: Settings) -> list[bool]:
    """Those of Qwen: from `max_window_layers` on, where `use_sliding_window` is set."""
    if not s.flag("use_sliding_window"):
        return []
    first = s.get("max_window_layers", default=28)
    if type(first) is not int or first < 0:
        s.refuse("max_window_layers", first, "a whole number of at least 0")
    return sliding_layers(s, lambda layer: layer >= first)


def every_layer(s: Settings) -> list[bool]:
    return [True] * s.layers()


def by_layer(common: Mapping[str, Any], other: Mapping[str, Any], differs: list[bool]) -> Fields:
    """Fields of a model some of whose layers differ, beside those that differ already: common holds for all others.

    differs: for each layer.
    """
    kinds, pattern = common.get("layer_kinds") or [{}], common.get("layer_pattern") or [0]
    shared = {name: value for name, value in common.items() if name not in ("layer_kinds", "layer_pattern")}
    before = (kinds[pattern[i % len(pattern)]] for i in range(len(differs)))
    own = [{**kind, **other} if differ else dict(kind) for kind, differ in zip(before, differs, strict=True)]
    distinct = [kind for i, kind in enumerate(own) if kind not in own[:i]]
    if len(distinct) == 1:
        return {**shared, **distinct[0]}
    return {**shared, "layer_kinds": distinct, "layer_pattern": shortest([distinct.index(kind) for kind in own])}


def shortest(pattern: list[int]) -> list[int]:
    """The shortest beginning that, repeated, is the whole."""
    sizes = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in sizes if all(own == pattern[i % n] for i, own in enumerate(pattern)))
