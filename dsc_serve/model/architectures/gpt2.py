"""GPT-2: learned positions, LayerNorm, biases everywhere, and matrices stored the other way round."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dsc_serve.model.architectures.family import ATTENTION, EMBEDDING, Architecture, activation
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed, split_rows, transposed, without
from dsc_serve.model.config import ModelConfig
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


def fields(s: Settings) -> Fields:
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    width, heads = s.size("n_embd", "hidden_size"), s.size("n_head", "num_attention_heads")
    return {
        "vocab_size": s.get("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": s.layers("n_layer", "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "max_position_embeddings": s.size("n_positions", "max_position_embeddings"),
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "norm_eps": s.get("layer_norm_epsilon", default=1e-5),
        "attention_bias": True,
        "attention_output_bias": True,
        "hidden_act": activation(s, "activation_function", "gelu_new"),
        "tie_word_embeddings": s.get("tie_word_embeddings", default=True),
        "ffn": {"kind": "dense", "size": s.get("n_inner", default=4 * width), "bias": True},
    }


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    found = renamed(without(stored, BUFFERS), NAMES)
    transposed(found, MATRICES)
    for i in range(config.num_hidden_layers):
        attention = f"model.layers.{i}.self_attn."
        for part in ("weight", "bias"):
            rows = {f"{attention}{name}_proj.{part}": config.query_size for name in "qkv"}
            split_rows(found, f"{attention}qkv.{part}", rows, s.path)
    return found


GPT2 = Architecture(fields, tensors, MODULES, transposed=True)
