"""Falcon: LayerNorm, branches beside each other under one norm or two, and few heads of keys and values, often one."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_serve.model.architectures.family import ATTENTION, EMBEDDING, Architecture, frame, share_of_width
from dsc_serve.model.architectures.heads import split_heads
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.field_value import FieldValue
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


DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "max_position_embeddings": 2048,
    "activation": "gelu",
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "multi_query": True,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}


def key_value_heads(s: Settings) -> FieldValue:
    if not s.flag("new_decoder_architecture") and s.flag("multi_query"):
        return FieldValue(1, "multi_query")
    given = s.flag("new_decoder_architecture") and s.get("num_kv_heads") is not None
    return s.read_size("num_kv_heads" if given else "num_attention_heads")


def norms(s: Settings) -> str:
    """Where they stand: the newer architecture has its branches beside each other, mostly with a norm for each."""
    newer, parallel = s.flag("new_decoder_architecture"), s.flag("parallel_attn")
    if not newer:
        return "shared" if parallel else "before"
    s.only("num_ln_in_parallel_attn", 1, 2)
    return "shared" if s.get("num_ln_in_parallel_attn") == 1 else "parallel"


def fields(s: Settings) -> Fields:
    s.only("alibi", False, supported="False: rotary positions")
    bias, width = s.flag("bias"), s.read_size("n_embed", "hidden_size")  # the first is the older name
    s.size("num_attention_heads")
    s, inner = s.changed(hidden_size=width.value), s.read("ffn_hidden_size")
    return frame(s, eps="layer_norm_epsilon", act="activation") | {
        "hidden_size": width,
        "head_dim": share_of_width(s),
        "num_key_value_heads": key_value_heads(s),
        "norm_type": "layernorm",
        "norms": norms(s),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_gated": False,
        "ffn": {
            "kind": "dense",
            "size": inner if inner.value is not None else FieldValue(4 * width.value, f"4 * {width.name}"),
            "bias": bias,
        },
    }


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    found = renamed(stored, NAMES)
    for i in range(config.num_hidden_layers):
        split_heads(found, f"model.layers.{i}.self_attn.", config.num_key_value_heads, config, s.path)
    return found


FALCON = Architecture(fields, tensors, DEFAULTS, MODULES)
