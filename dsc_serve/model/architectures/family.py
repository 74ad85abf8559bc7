"""What a family of checkpoints is: how its configuration and its tensors become those of the serving form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.field_value import FieldValue
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
    """One family. It knows Hugging Face's names alone: what reads another form of file translates to these."""

    # The fields of a ModelConfig, but for `bos_token_id` and `eos_token_id`; those that are read as they stand with
    # their names there. Raises CheckpointError naming the field that is not supported, its value, and what is.
    mapping: Callable[[Settings], Fields]
    # The stored tensors under the names and in the shapes of `tensor_shapes`; what is missing or left is found later
    conversion: Callable[[Mapping[str, Stored], Settings, ModelConfig], Tensors] = as_stored
    # What the family's configuration in transformers has where a field is left out
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Those linear ones that adapters may change, {} for the layer's number
    modules: Modules = field(default_factory=lambda: LLAMA_MODULES)
    transposed: bool = False  # whether their matrices are stored the other way round

    def fields(self, s: Settings) -> Fields:
        return self.mapping(s.over(self.defaults))

    def tensors(self, stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
        return self.conversion(stored, s.over(self.defaults), config)


def sizes(*of: int, eps: float = 1e-6, norm: str = "rms_norm_eps", act: str = "hidden_act") -> Fields:
    """Defaults that all families of gated MLPs have.

    of: vocabulary, width, that of an MLP, layers, heads, positions. norm, act: the fields of a norm's number and of
    the activation.
    """
    vocabulary, width, inner, layers, heads, context = of
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        act: "silu",
        norm: eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def activation(s: Settings, field: str = "hidden_act") -> str:
    """The activation that a field names. Raises CheckpointError."""
    name = s.get(field)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        s.refuse(field, name, ", ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def frame(s: Settings, positions: Positions = ROTARY, eps: str = "rms_norm_eps", act: str = "hidden_act") -> Fields:
    """What most decoders share, Llama above all. eps, act: the fields that give a norm's number and the activation."""
    size = head_size(s)
    return {
        **{name: s.read(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": s.read("num_key_value_heads", default=s.get("num_attention_heads")),
        "head_dim": size,
        "norm_type": "rmsnorm",
        "norm_eps": s.read(eps),
        "hidden_act": activation(s, act),
        "mlp_gated": True,
        "tie_word_embeddings": s.flag("tie_word_embeddings"),
        **positions.fields(s, size.value),
    }


def head_size(s: Settings) -> FieldValue:
    """The size of a head: as it is said, or the width over the heads; None where neither is a number."""
    size = s.read("head_dim")
    return size if size.value is not None else share_of_width(s)


def share_of_width(s: Settings) -> FieldValue:
    """The size of a head where the width is all heads'. Raises CheckpointError where `head_dim` is another."""
    width, heads = s.get("hidden_size"), s.get("num_attention_heads")
    name = f"{s.told('hidden_size')} // {s.told('num_attention_heads')}"
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return FieldValue(None, name)
    s.only("head_dim", width // heads, supported=f"{width // heads}, {name}")
    return FieldValue(width // heads, name)


def dense(s: Settings, size: str = "intermediate_size", bias: bool = False) -> Fields:
    return {"kind": "dense", "size": s.read(size), "bias": bias}


WINDOW, KINDS = "sliding_window", ("full_attention", "sliding_attention")


def windowed(s: Settings, fields: Fields, sliding: list[bool]) -> Fields:
    """Fields of a model whose layers see a window only where `sliding` says so. Raises CheckpointError."""
    if s.get(WINDOW) is None or not any(sliding):
        return fields
    return by_layer(fields, {"window": s.read_size(WINDOW)}, sliding)


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
    first = s.whole("max_window_layers")
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
