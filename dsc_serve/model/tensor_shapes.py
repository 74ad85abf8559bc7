"""Names and shapes of what a checkpoint of a configuration stores."""

from __future__ import annotations

import torch

from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn import KINDS, Shapes

# By `norms` of a layer the names of attention's norm and the FFN's, which may be one.
NORM_NAMES = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "shared": ("input_layernorm", "input_layernorm"),
    "around": ("input_layernorm", "pre_feedforward_layernorm"),
}
# Where norms stand around branches those of what attention and the FFN give.
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor that a checkpoint of this configuration stores."""
    d = config.hidden_size

    def norm(name: str) -> Shapes:
        parts = ("weight", "bias") if config.norm_type == "layernorm" else ("weight",)
        return {f"{name}.{part}": (d,) for part in parts}

    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, d)}
    if config.position_embedding_type == "learned":
        shapes["model.embed_positions.weight"] = (config.max_position_embeddings, d)
    for i, kind in enumerate(config.layers):
        layer = f"model.layers.{i}"
        first, second = NORM_NAMES[kind.norms]
        shapes |= norm(f"{layer}.{first}")
        for name, size in projections(config).items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, d)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, config.num_attention_heads * config.value_size)
        if config.attention_output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (d,)
        if kind.qk_norm == "latent":
            shapes[f"{layer}.self_attn.k_norm.weight"] = (kind.value_size,)
        elif kind.qk_norm != "none":
            sizes = (kind.head_dim,) * 2 if kind.qk_norm == "head" else (kind.query_size, kind.kv_size)
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (n,) for name, n in zip("qk", sizes, strict=True)}
        shapes |= norm(f"{layer}.{second}")  # after attention's: the order is that in which weights are drawn
        if kind.norms == "around":
            shapes |= norm(f"{layer}.{BEHIND[0]}") | norm(f"{layer}.{BEHIND[1]}")
        ffn = KINDS[kind.ffn.kind].shapes(kind)
        shapes |= {f"{layer}.mlp.{name}": shape for name, shape in ffn.items()}
    shapes |= norm("model.norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def projections(config: ModelConfig) -> dict[str, int]:
    """The rows of the projections to queries, keys and, where they do not lie within these, values."""
    values = {} if config.latent_size is not None else {"v": config.kv_size}
    return {"q": config.query_size, "k": config.kv_size, **values}


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Total parameters, and those that one token uses."""
    total = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    return total, total - sum(KINDS[kind.ffn.kind].idle_parameters(kind) for kind in config.layers)
