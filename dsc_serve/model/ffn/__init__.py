"""The FFN kinds: a registry with one file per member. Each is built from the tensors of one block's `mlp`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from dsc_kernels.backend import Layer
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Adapted
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn.dense import DenseFfn
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.ffn.moe import MoeFfn
from dsc_serve.model.ffn.molora import MoloraFfn
from dsc_serve.model.placement import Placement

Shapes = dict[str, tuple[int, ...]]


class FfnLayer(Protocol):
    """A block's feed-forward layer: x [T, d] → [T, d], each token on its own, plus the residual where one is given."""

    @property
    def layer(self) -> Layer: ...

    @staticmethod
    def shapes(config: ModelConfig) -> Shapes:
        """Names, below `mlp.`, and shapes of the tensors one block stores."""

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        """Parameters of one block that a single token does not use."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None: ...

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor: ...


KINDS: dict[str, type[FfnLayer]] = {"dsc": DscFfn, "moe": MoeFfn, "molora": MoloraFfn, "dense": DenseFfn}
