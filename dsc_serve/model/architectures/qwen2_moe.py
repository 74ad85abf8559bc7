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
    sliding_layers,
    windowed,
)
from dsc_serve.model.architectures.settings import Fields, Settings


def fields(s: Settings) -> Fields:
    shared = {"size": s.get("shared_expert_intermediate_size"), "gated": True}
    experts = mixture(s, ("num_experts", "num_local_experts"), "moe_intermediate_size", s.flag("norm_topk_prob"))
    own = {"attention_bias": s.flag("qkv_bias", default=True), "ffn": {**experts, "shared_expert": shared}}
    return windowed(s, by_layer(frame(s) | own, {"ffn": dense(s)}, dense_layers(s)), every_second(s), default=4096)


def every_second(s: Settings) -> list[bool]:
    """Which layers see a window only: of the first `max_window_layers` every second, where it is used."""
    if not s.flag("use_sliding_window"):
        return []
    end = s.get("max_window_layers", default=28)
    if type(end) is not int or end < 0:
        s.refuse("max_window_layers", end, "a whole number of at least 0")
    return sliding_layers(s, lambda layer: layer % 2 == 0 and layer < end)


QWEN2_MOE = Architecture(fields, expert_tensors, {**LLAMA_MODULES, **SHARED_EXPERT})
