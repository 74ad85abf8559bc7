"""Mixtral: Mistral with a mixture of experts whose weights sum to 1."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_serve.model.architectures.experts import expert_tensors, mixture
from dsc_serve.model.architectures.family import Architecture, every_layer, frame, sizes, windowed
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

NAMES = {
    r"\.block_sparse_moe\.gate\.": ".mlp.router.",
    r"\.block_sparse_moe\.experts\.(\d+)\.w1\.": r".mlp.experts.\1.gate_proj.",
    r"\.block_sparse_moe\.experts\.(\d+)\.w3\.": r".mlp.experts.\1.up_proj.",
    r"\.block_sparse_moe\.experts\.(\d+)\.w2\.": r".mlp.experts.\1.down_proj.",
}


DEFAULTS = sizes(32000, 4096, 14336, 32, 32, 131072, eps=1e-5) | {
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
}


def fields(s: Settings) -> Fields:
    ffn = mixture(s, ("num_experts", "num_local_experts"), "intermediate_size", normalize=True)
    return windowed(s, frame(s) | {"ffn": ffn}, every_layer(s))


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    return expert_tensors(renamed(stored, NAMES), s, config)


MIXTRAL = Architecture(fields, tensors, DEFAULTS)
