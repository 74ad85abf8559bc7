"""OLMoE and OLMo 2: a norm over all heads of queries and of keys together; OLMo 2 norms what branches give."""

from __future__ import annotations

from dsc_serve.model.architectures.experts import expert_tensors, mixture
from dsc_serve.model.architectures.family import Architecture, frame
from dsc_serve.model.architectures.settings import Fields, Settings


def fields(s: Settings) -> Fields:
    if s.get("clip_qkv") is not None:
        s.refuse("clip_qkv", s.get("clip_qkv"), "none")
    bias = s.flag("attention_bias")
    own = {"qk_norm": "all", "attention_bias": bias, "attention_output_bias": bias}
    return frame(s) | own | {"norm_eps": s.get("rms_norm_eps", default=1e-5)}


def olmoe_fields(s: Settings) -> Fields:
    normalize = s.flag("norm_topk_prob")
    return fields(s) | {"ffn": mixture(s, ("num_experts", "num_local_experts"), "intermediate_size", normalize)}


def olmo2_fields(s: Settings) -> Fields:
    return fields(s) | {"norms": "after"}


OLMOE, OLMO2 = Architecture(olmoe_fields, expert_tensors), Architecture(olmo2_fields)
