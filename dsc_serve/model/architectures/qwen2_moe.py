"""Qwen2-MoE: Qwen2 with a mixture of experts and one that all tokens share, weighted by a gate of its own."""

from __future__ import annotations

from dsc_serve.model.architectures.experts import dense_layers, expert_tensors, mixture
from dsc_serve.model.architectures.family import (
    LLAMA_MODULES,
    SHARED_EXPERT,
    Architecture,
    by_layer,
    dense,
    frame,
    sizes,
    sliding_layers,
    windowed,
)
from dsc_serve.model.architectures.settings import Fields, Settings

DEFAULTS = sizes(151936, 2048, 5632, 24, 16, 32768) | {
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "qkv_bias": True,
}


def fields(s: Settings) -> Fields:
    shared = {"size": s.read("shared_expert_intermediate_size"), "gated": True}
    experts = mixture(s, ("num_local_experts", "num_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    own = {"attention_bias": s.flag("qkv_bias"), "ffn": {**experts, "shared_expert": shared}}
    return windowed(s, by_layer(frame(s) | own, {"ffn": dense(s)}, dense_layers(s)), every_second(s))


def every_second(s: Settings) -> list[bool]:
    """Which layers see a window only: of the first `max_window_layers` every second, where it is used."""
    if not s.flag("use_sliding_window"):
        return []
    end = s.whole("max_window_layers")
    return sliding_layers(s, lambda layer: layer % 2 == 0 and layer < end)


QWEN2_MOE = Architecture(fields, expert_tensors, DEFAULTS, {**LLAMA_MODULES, **SHARED_EXPERT})
