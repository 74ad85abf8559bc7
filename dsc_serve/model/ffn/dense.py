"""The dense FFN."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Adapted, FfnOptions
from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights
from dsc_serve.model.placement import Placement


class DenseFfn:
    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        assert isinstance(config.ffn, DenseConfig)
        weights = mlp_weights(config, tensors, place, biased=config.ffn.bias)
        self.layer = ops.ffn(weights, FfnOptions(activation=config.hidden_act))

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return self.layer(x, residual, adapted=adapted)

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
