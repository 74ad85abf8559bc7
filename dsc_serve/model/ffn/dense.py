"""The dense FFN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights


class DenseFfn:
    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layer = ops.ffn(*mlp_weights(config, tensors, dtype, device), config.hidden_act)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer(x, residual)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        assert isinstance(config.ffn, DenseConfig)
        return mlp_shapes(config, config.ffn.size)

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        return 0
