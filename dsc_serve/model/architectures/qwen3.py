"""Qwen3 and Qwen3-MoE: a norm over each head of queries and keys; some layers of the mixture may be dense."""

from __future__ import annotations

from dsc_serve.model.architectures.experts import dense_layers, expert_tensors, mixture
from dsc_serve.model.architectures.family import (
    Architecture,
    as_stored,
    by_layer,
    dense,
    every_layer,
    frame,
    later_layers,
    sizes,
    windowed,
)
from dsc_serve.model.architectures.settings import Fields, Settings

DEFAULTS = sizes(151936, 4096, 22016, 32, 32, 32768) | {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
MOE_DEFAULTS = sizes(151936, 2048, 6144, 24, 32, 32768) | {
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "sliding_window": 4096,
}


def fields(s: Settings) -> Fields:
    return windowed(s, heads(s) | {"ffn": dense(s)}, later_layers(s))


def heads(s: Settings) -> Fields:
    bias = s.flag("attention_bias")
    return frame(s) | {"qk_norm": "head", "attention_bias": bias, "attention_output_bias": bias}


def moe_fields(s: Settings) -> Fields:
    experts = mixture(s, ("num_local_experts", "num_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    own = by_layer(heads(s) | {"ffn": experts}, {"ffn": dense(s)}, dense_layers(s))
    return windowed(s, own, every_layer(s) if s.flag("use_sliding_window") else [])


QWEN3 = Architecture(fields, as_stored, DEFAULTS)
QWEN3_MOE = Architecture(moe_fields, expert_tensors, MOE_DEFAULTS)
