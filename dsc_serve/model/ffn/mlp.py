"""The tensors of the MLP that every FFN kind contains: plain or gated, in its own or an expert's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dsc_kernels.weights import MlpWeights
from dsc_serve.model.config import ModelConfig


def mlp_shapes(config: ModelConfig, size: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    d = config.hidden_size
    names = ("up_proj", "gate_proj") if config.mlp_gated else ("up_proj",)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": (size, d) for name in names}
    shapes[f"{prefix}down_proj.weight"] = (d, size)
    return shapes


def mlp_weights(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    prefix: str = "",
    part: Literal["weight", "bias"] = "weight",
) -> MlpWeights:
    """The tensors of an MLP below `prefix`; with part "bias" the biases that belong to them."""

    def weight(name: str) -> Tensor:
        return tensors[f"{prefix}{name}.{part}"].to(device=device, dtype=dtype)

    return MlpWeights(weight("up_proj"), weight("gate_proj") if config.mlp_gated else None, weight("down_proj"))
