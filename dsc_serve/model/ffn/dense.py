"""The dense FFN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.weights import Activation, FfnOptions, MlpWeights
from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights


class BiasedMlp:
    """W_2 act(W_1 x + b_1) + b_2, or W_2 (act(W_g x + b_g) ⊙ (W_1 x + b_1)) + b_2 with a gate."""

    def __init__(self, weights: MlpWeights, biases: MlpWeights, activation: Activation) -> None:
        self.up, self.down = ops.linear(weights.up, biases.up), ops.linear(weights.down, biases.down)
        self.gate = None if weights.gate is None else ops.linear(weights.gate, biases.gate)
        self.activation = activation
        self.backend = self.up.backend

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, d] → the layer's output plus residual, [T, d]."""
        if self.gate is None:
            return self.down(self.up(x, self.activation), residual=residual)
        return self.down(self.gate(x, self.activation) * self.up(x), residual=residual)


class DenseFfn:
    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        assert isinstance(config.ffn, DenseConfig)
        weights = mlp_weights(config, tensors, dtype, device)
        self.layer: ops.Layer
        if config.ffn.bias:
            biases = mlp_weights(config, tensors, dtype, device, part="bias")
            self.layer = BiasedMlp(weights, biases, config.hidden_act)
        else:
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
