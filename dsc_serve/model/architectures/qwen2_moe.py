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
    full_attention,
)
from dsc_serve.model.architectures.settings import Fields, Settings


def fields(s: Settings) -> Fields:
    full_attention(s, acts=bool(s.get("use_sliding_window")))
    shared = {"size": s.get("shared_expert_intermediate_size"), "gated": True}
    experts = mixture(s, ("num_experts", "num_local_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    own = {"attention_bias": s.flag("qkv_bias", default=True), "ffn": {**experts, "shared_expert": shared}}
    return by_layer(frame(s) | own, {"ffn": dense(s)}, dense_layers(s))


QWEN2_MOE = Architecture(fields, expert_tensors, {**LLAMA_MODULES, **SHARED_EXPERT})
