"""OLMoE and OLMo 2: a norm over all heads of queries and of keys together; OLMo 2 norms what branches give."""

from __future__ import annotations

from dsc_serve.model.architectures.experts import expert_tensors, mixture
from dsc_serve.model.architectures.family import Architecture, as_stored, dense, frame, sizes
from dsc_serve.model.architectures.settings import Fields, Settings

OLMO2_DEFAULTS = sizes(50304, 4096, 11008, 32, 32, 2048, eps=1e-5)
OLMOE_DEFAULTS = sizes(50304, 2048, 2048, 16, 16, 4096, eps=1e-5) | {
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


def fields(s: Settings) -> Fields:
    s.only("clip_qkv", supported="none")
    bias = s.flag("attention_bias")
    return frame(s) | {"qk_norm": "all", "attention_bias": bias, "attention_output_bias": bias}


def olmoe_fields(s: Settings) -> Fields:
    normalize = s.flag("norm_topk_prob")
    return fields(s) | {"ffn": mixture(s, ("num_local_experts", "num_experts"), "intermediate_size", normalize)}


def olmo2_fields(s: Settings) -> Fields:
    return fields(s) | {"norms": "after", "ffn": dense(s)}


OLMOE = Architecture(olmoe_fields, expert_tensors, OLMOE_DEFAULTS)
OLMO2 = Architecture(olmo2_fields, as_stored, OLMO2_DEFAULTS)
