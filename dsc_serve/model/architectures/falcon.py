"""Falcon: LayerNorm, branches beside each other under one norm or two, and few heads of keys and values, often one."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_serve.model.architectures.family import ATTENTION, EMBEDDING, Architecture, activation, frame
from dsc_serve.model.architectures.heads import split_heads
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

NAMES = {
    r"^transformer\.word_embeddings\.weight$": EMBEDDING,
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.h\.(\d+)\.(input_layernorm|ln_attn)\.": r"model.layers.\1.input_layernorm.",
    r"^transformer\.h\.(\d+)\.ln_mlp\.": r"model.layers.\1.post_attention_layernorm.",
    r"^transformer\.h\.(\d+)\.self_attention\.query_key_value\.": r"model.layers.\1.self_attn.qkv.",
    r"^transformer\.h\.(\d+)\.self_attention\.dense\.": r"model.layers.\1.self_attn.o_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.dense_h_to_4h\.": r"model.layers.\1.mlp.up_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.dense_4h_to_h\.": r"model.layers.\1.mlp.down_proj.",
    r"^transformer\.h\.": "model.layers.",
}

MODULES = {
    "transformer.h.{}.self_attention.query_key_value": ATTENTION,
    "transformer.h.{}.self_attention.dense": ("self_attn.o_proj",),
    "transformer.h.{}.mlp.dense_h_to_4h": ("mlp.up_proj",),
    "transformer.h.{}.mlp.dense_4h_to_h": ("mlp.down_proj",),
}


def key_value_heads(s: Settings) -> int:
    if s.flag("new_decoder_architecture"):
        return s.size("num_kv_heads", "num_attention_heads")
    return 1 if s.flag("multi_query", default=True) else s.size("num_attention_heads")


def norms(s: Settings) -> str:
    """Where they stand: the newer architecture has its branches beside each other, mostly with a norm for each."""
    newer, parallel = s.flag("new_decoder_architecture"), s.flag("parallel_attn", default=True)
    if not newer:
        return "shared" if parallel else "before"
    return "shared" if s.size("num_ln_in_parallel_attn", default=2) == 1 else "parallel"


def fields(s: Settings) -> Fields:
    s.only("alibi", False, supported="False: rotary positions")
    bias, width = s.flag("bias"), s.size("hidden_size")
    context = s.size("max_position_embeddings", default=2048)
    inner = Settings({**s.content, "max_position_embeddings": context}, s.path)
    return frame(inner) | {
        "head_dim": width // s.size("num_attention_heads"),
        "num_key_value_heads": key_value_heads(s),
        "norm_type": "layernorm",
        "norm_eps": s.get("layer_norm_epsilon", default=1e-5),
        "norms": norms(s),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "hidden_act": activation(s, "activation", "gelu"),
        "mlp_gated": False,
        "tie_word_embeddings": s.get("tie_word_embeddings", default=True),
        "ffn": {"kind": "dense", "size": s.get("ffn_hidden_size", default=4 * width), "bias": bias},
    }


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    found = renamed(stored, NAMES)
    for i in range(config.num_hidden_layers):
        split_heads(found, f"model.layers.{i}.self_attn.", config.num_key_value_heads, config, s.path)
    return found


FALCON = Architecture(fields, tensors, MODULES)
