"""Qwen3 and Qwen3-MoE: a norm over each head of queries and keys; some layers of the mixture may be dense."""

from __future__ import annotations

from dsc_serve.model.architectures.experts import dense_layers, expert_tensors, mixture
from dsc_serve.model.architectures.family import Architecture, by_layer, dense, frame, full_attention
from dsc_serve.model.architectures.settings import Fields, Settings


def fields(s: Settings) -> Fields:
    full_attention(s, acts=bool(s.get("use_sliding_window")))
    bias = s.flag("attention_bias")
    own = {"qk_norm": "head", "attention_bias": bias, "attention_output_bias": bias}
    return frame(s) | own | {"head_dim": s.get("head_dim", default=128)}


def moe_fields(s: Settings) -> Fields:
    experts = mixture(s, ("num_experts", "num_local_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    return by_layer(fields(s) | {"ffn": experts}, {"ffn": dense(s)}, dense_layers(s))


QWEN3, QWEN3_MOE = Architecture(fields), Architecture(moe_fields, expert_tensors)
