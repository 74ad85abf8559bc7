"""What a family of checkpoints is: how its configuration and its tensors become those of the serving form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc_serve.files import CheckpointError
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


def full_attention(s: Settings, acts: bool, default: int | None = None) -> None:
    """Raises CheckpointError where the sliding window that a config names would be felt; acts: whether it is used."""
    window, context = s.content.get("sliding_window", default), s.get("max_position_embeddings")
    if acts and isinstance(window, int) and isinstance(context, int) and window < context:
        raise CheckpointError(f"{s.path}: sliding_window is {window}, below the context of {context}; supported: none")


def by_layer(common: Mapping[str, Any], other: Mapping[str, Any], differs: list[bool]) -> Fields:
    """Fields of a model some of whose layers differ: common holds for all others. differs: for each layer."""
    if not any(differs):
        return dict(common)
    if all(differs):
        return {**common, **other}
    return {
        **common,
        "layer_kinds": [{}, dict(other)] if not differs[0] else [dict(other), {}],
        "layer_pattern": shortest([int(own != differs[0]) for own in differs]),
    }


def shortest(pattern: list[int]) -> list[int]:
    """The shortest beginning that, repeated, is the whole."""
    sizes = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in sizes if all(own == pattern[i % n] for i, own in enumerate(pattern)))
