"""Qwen3 and Qwen3-MoE: a norm over each head of queries and keys; some layers of the mixture may be dense."""

from __future__ import annotations

from dsc_serve.model.architectures.experts import dense_layers, expert_tensors, mixture
from dsc_serve.model.architectures.family import (
    Architecture,
    by_layer,
    dense,
    every_layer,
    frame,
    later_layers,
    windowed,
)
from dsc_serve.model.architectures.settings import Fields, Settings


def fields(s: Settings) -> Fields:
    return windowed(s, heads(s), later_layers(s), default=4096)


def heads(s: Settings) -> Fields:
    bias = s.flag("attention_bias")
    own = {"qk_norm": "head", "attention_bias": bias, "attention_output_bias": bias}
    return frame(s) | own | {"head_dim": s.get("head_dim", default=128)}


def moe_fields(s: Settings) -> Fields:
    experts = mixture(s, ("num_experts", "num_local_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    own = by_layer(heads(s) | {"ffn": experts}, {"ffn": dense(s)}, dense_layers(s))
    return windowed(s, own, every_layer(s) if s.flag("use_sliding_window") else [], default=4096)


QWEN3, QWEN3_MOE = Architecture(fields), Architecture(moe_fields, expert_tensors)
