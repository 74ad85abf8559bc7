"""Small random models and the reference script's data, for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import tensor_shapes

DATA = Path(__file__).parents[1] / "data"
METHODS = ("dsc", "standard_moe", "dense")

SMALL_FFN: dict[str, dict[str, Any]] = {
    "dsc": {"kind": "dsc", "num_atoms": 37, "atoms_per_token": 3, "static_size": 24},
    "moe": {"kind": "moe", "num_experts": 5, "experts_per_token": 2, "expert_size": 20},
    "molora": {"kind": "molora", "num_adapters": 6, "adapters_per_token": 2, "rank": 3, "static_size": 24},
    "dense": {"kind": "dense", "size": 40},
}


def small_config(kind: str = "dsc", ffn: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 48,
    }
    return ModelConfig.model_validate({**fields, **changes, "ffn": {**SMALL_FFN[kind], **(ffn or {})}})


def wide_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights wide enough that every part of the model matters to its output."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensor = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensor = 0.3 * tensor + (1.0 if name.endswith("weight") else 0.0)
        elif "embed" not in name:
            tensor = tensor / max(shape[-1], 1) ** 0.5
        tensors[name] = tensor
    return tensors
