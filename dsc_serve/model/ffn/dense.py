"""The dense FFN."""

from __future__ import annotations

from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.model.ffn.mlp import Mlp, mlp_shapes


class DenseFfn(Mlp):
    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        assert isinstance(config.ffn, DenseConfig)
        return mlp_shapes(config, config.ffn.size)

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        return 0
