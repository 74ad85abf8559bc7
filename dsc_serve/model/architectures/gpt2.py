"""GPT-2: learned positions, LayerNorm, biases everywhere, and matrices stored the other way round."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from dsc_serve.model.architectures.family import ATTENTION, EMBEDDING, Architecture, activation
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed, scaled, split_rows, transposed, without
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.source import Stored

BUFFERS = r"\.attn\.(bias|masked_bias)$"
NAMES = {  # older files leave out the first word
    r"^(transformer\.)?wte\.weight$": EMBEDDING,
    r"^(transformer\.)?wpe\.weight$": "model.embed_positions.weight",
    r"^(transformer\.)?ln_f\.": "model.norm.",
    r"^(transformer\.)?h\.(\d+)\.ln_1\.": r"model.layers.\2.input_layernorm.",
    r"^(transformer\.)?h\.(\d+)\.ln_2\.": r"model.layers.\2.post_attention_layernorm.",
    r"^(transformer\.)?h\.(\d+)\.attn\.c_attn\.": r"model.layers.\2.self_attn.qkv.",
    r"^(transformer\.)?h\.(\d+)\.attn\.c_proj\.": r"model.layers.\2.self_attn.o_proj.",
    r"^(transformer\.)?h\.(\d+)\.mlp\.c_fc\.": r"model.layers.\2.mlp.up_proj.",
    r"^(transformer\.)?h\.(\d+)\.mlp\.c_proj\.": r"model.layers.\2.mlp.down_proj.",
}
MODULES = {
    "transformer.h.{}.attn.c_attn": ATTENTION,
    "transformer.h.{}.attn.c_proj": ("self_attn.o_proj",),
    "transformer.h.{}.mlp.c_fc": ("mlp.up_proj",),
    "transformer.h.{}.mlp.c_proj": ("mlp.down_proj",),
}
MATRICES = re.compile(r"\.(qkv|o_proj|up_proj|down_proj)\.weight$")


DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
WIDTH, HEADS = ("hidden_size", "n_embd"), ("num_attention_heads", "n_head")


def fields(s: Settings) -> Fields:
    s.only("add_cross_attention", False)
    width, heads = s.read_size(*WIDTH), s.read_size(*HEADS)
    inner = s.read("n_inner")
    s.layers("num_hidden_layers", "n_layer")
    return {
        "vocab_size": s.read("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": s.read_size("num_hidden_layers", "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": FieldValue(width.value // heads.value, f"{width.name} // {heads.name}"),
        "max_position_embeddings": s.read_size("max_position_embeddings", "n_positions"),
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "norm_eps": s.read("layer_norm_epsilon"),
        "attention_bias": True,
        "attention_output_bias": True,
        "hidden_act": activation(s, "activation_function"),
        "tie_word_embeddings": s.flag("tie_word_embeddings"),
        "ffn": {"kind": "dense", "size": inner if inner.value is not None else times_four(width), "bias": True},
    }


def times_four(width: FieldValue) -> FieldValue:
    return FieldValue(4 * width.value, f"4 * {width.name}")


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    found = renamed(without(stored, BUFFERS), NAMES)
    transposed(found, MATRICES)
    for i in range(config.num_hidden_layers):
        attention = f"model.layers.{i}.self_attn."
        for part in ("weight", "bias"):
            rows = {f"{attention}{name}_proj.{part}": config.query_size for name in "qkv"}
            split_rows(found, f"{attention}qkv.{part}", rows, s.path)
            scaled(found, f"{attention}q_proj.{part}", query_scale(s, i, config))
    return found


def query_scale(s: Settings, layer: int, config: ModelConfig) -> float:
    """What a layer's scores are multiplied by beside 1 / √(head size), which goes into its queries."""
    whole = 1.0 if s.flag("scale_attn_weights") else math.sqrt(config.head_dim)
    return whole / (layer + 1) if s.flag("scale_attn_by_inverse_layer_idx") else whole


GPT2 = Architecture(fields, tensors, DEFAULTS, MODULES, transposed=True)
