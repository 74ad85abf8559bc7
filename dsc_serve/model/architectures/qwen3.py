"""Qwen3 and Qwen3-MoE: a norm over each head of queries and keys; some layers of the mixture may be dense."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_serve.model.architectures.experts import mixture, unstacked
from dsc_serve.model.architectures.family import Architecture, by_layer, dense, frame, full_attention
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

NAMES = {r"\.mlp\.gate\.": ".mlp.router."}
STACKED = {".mlp.experts.gate_up_proj": "gate_proj+up_proj", ".mlp.experts.down_proj": "down_proj"}


def fields(s: Settings) -> Fields:
    full_attention(s, acts=bool(s.get("use_sliding_window")))
    bias = s.flag("attention_bias")
    own = {"qk_norm": "head", "attention_bias": bias, "attention_output_bias": bias}
    return frame(s) | own | {"head_dim": s.get("head_dim", default=128)}


def dense_layers(s: Settings) -> list[bool]:
    """Which layers have a plain MLP: those named, and those between the mixtures. Raises CheckpointError."""
    named, every = s.get("mlp_only_layers", default=[]), s.size("decoder_sparse_step", default=1)
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        s.refuse("mlp_only_layers", named, "a list of layers' numbers")
    layers = range(s.size("num_hidden_layers"))
    return [layer in named or (layer + 1) % every > 0 for layer in layers]


def moe_fields(s: Settings) -> Fields:
    experts = mixture(s, ("num_experts", "num_local_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    return by_layer(s, fields(s) | {"ffn": experts}, {"ffn": dense(s)}, dense_layers(s))


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    return unstacked(renamed(stored, NAMES), s, config, STACKED)


QWEN3, QWEN3_MOE = Architecture(fields), Architecture(moe_fields, tensors)
