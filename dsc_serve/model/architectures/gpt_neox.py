"""GPT-NeoX, as Pythia is: LayerNorm, biases, heads of which a part is turned, branches beside each other."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_serve.model.architectures.family import ATTENTION, EMBEDDING, HEAD, Architecture, frame, share_of_width
from dsc_serve.model.architectures.heads import split_heads
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed, without
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

POSITIONS = Positions("rotary_emb_base", share="rotary_pct", partial=True)
DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
BUFFERS = r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"
NAMES = {
    r"^gpt_neox\.embed_in\.weight$": EMBEDDING,
    r"^embed_out\.weight$": HEAD,
    r"^gpt_neox\.final_layer_norm\.": "model.norm.",
    r"^gpt_neox\.layers\.(\d+)\.attention\.query_key_value\.": r"model.layers.\1.self_attn.qkv.",
    r"^gpt_neox\.layers\.(\d+)\.attention\.dense\.": r"model.layers.\1.self_attn.o_proj.",
    r"^gpt_neox\.layers\.(\d+)\.mlp\.dense_h_to_4h\.": r"model.layers.\1.mlp.up_proj.",
    r"^gpt_neox\.layers\.(\d+)\.mlp\.dense_4h_to_h\.": r"model.layers.\1.mlp.down_proj.",
    r"^gpt_neox\.layers\.": "model.layers.",
}

MODULES = {
    "gpt_neox.layers.{}.attention.query_key_value": ATTENTION,
    "gpt_neox.layers.{}.attention.dense": ("self_attn.o_proj",),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h": ("mlp.up_proj",),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h": ("mlp.down_proj",),
}


def fields(s: Settings) -> Fields:
    bias = s.flag("attention_bias")
    return frame(s, POSITIONS, "layer_norm_eps") | {
        "num_key_value_heads": s.read("num_attention_heads"),
        "head_dim": share_of_width(s),
        "norm_type": "layernorm",
        "norms": "parallel" if s.flag("use_parallel_residual") else "before",
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_gated": False,
        "ffn": {"kind": "dense", "size": s.read("intermediate_size"), "bias": True},
    }


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    found = renamed(without(stored, BUFFERS), NAMES)
    for i in range(config.num_hidden_layers):
        split_heads(found, f"model.layers.{i}.self_attn.", config.num_attention_heads, config, s.path)
    return found


GPT_NEOX = Architecture(fields, tensors, DEFAULTS, MODULES)
