"""The dense FFN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.weights import FfnOptions, MlpWeights
from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights


class DenseFfn:
    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        assert isinstance(config.ffn, DenseConfig)
        weights = mlp_weights(config, tensors, dtype, device)
        if config.ffn.bias:
            own = mlp_weights(config, tensors, dtype, device, part="bias")
            biases = (b if isinstance(b, Tensor) else None for b in (own.up, own.gate, own.down))
            weights = MlpWeights(weights.up, weights.gate, weights.down, *biases)
        self.layer = ops.ffn(weights, FfnOptions(activation=config.hidden_act))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer(x, residual)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        assert isinstance(config.ffn, DenseConfig)
        shapes = mlp_shapes(config, config.ffn.size)
        if config.ffn.bias:
            shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
        return shapes

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        return 0
