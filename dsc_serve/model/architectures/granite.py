"""Granite and Granite-MoE: Llama with four numbers that activations are multiplied by, which go into the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dsc_serve.model.architectures.experts import mixture, unstacked
from dsc_serve.model.architectures.family import EMBEDDING, HEAD, Architecture, dense, frame, sizes
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed, scaled
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

NAMES = {r"\.block_sparse_moe\.router\.layer\.": ".mlp.router."}
STACKED = {
    ".block_sparse_moe.input_linear.weight": "gate_proj+up_proj",
    ".block_sparse_moe.output_linear.weight": "down_proj",
}


MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
DEFAULTS = sizes(32000, 4096, 11008, 32, 32, 2048) | MULTIPLIERS
MOE_DEFAULTS = DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2}


def fields(s: Settings) -> Fields:
    bias = s.flag("attention_bias")
    ffn = dense(s, bias=s.flag("mlp_bias"))
    own = {"attention_bias": bias, "attention_output_bias": bias, "tie_word_embeddings": False, "ffn": ffn}
    return frame(s) | own


def moe_fields(s: Settings) -> Fields:
    return fields(s) | {"ffn": mixture(s, ("num_local_experts",), "intermediate_size", normalize=True)}


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """With the multipliers folded in, which makes the head another matrix than the embedding."""
    found = unstacked(renamed(stored, NAMES), s, config, STACKED)
    if s.flag("tie_word_embeddings") and EMBEDDING in found:
        found.setdefault(HEAD, found[EMBEDDING])
    logits = s.number("logits_scaling")
    if logits == 0:
        s.refuse("logits_scaling", logits, "any number but 0")
    residual = s.number("residual_multiplier")
    factors = {
        "q_proj": s.number("attention_multiplier") * math.sqrt(config.head_dim),
        "o_proj": residual,
        "down_proj": residual,
    }
    scaled(found, EMBEDDING, s.number("embedding_multiplier"))
    scaled(found, HEAD, 1 / logits)
    for name in found:
        scaled(found, name, factors.get(name.split(".")[-2] if "." in name else "", 1.0))
    return found


GRANITE, GRANITE_MOE = Architecture(fields, tensors, DEFAULTS), Architecture(moe_fields, tensors, MOE_DEFAULTS)
