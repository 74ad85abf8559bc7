"""What ranks sum: the parts that each has of a product's output."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.weights import Activation
from dsc_serve.model.exchange import RankExchange


def whole(exchange: RankExchange, own: Tensor, residual: Tensor | None) -> Tensor:
    """The sum of what all ranks have, plus residual where one is given, which all have."""
    out = exchange.sum(own)
    return out if residual is None else out + residual


class SummedLinear:
    """A product of which each rank has some of the inputs' columns, its bias at the first rank alone."""

    def __init__(self, own: ops.Linear, exchange: RankExchange) -> None:
        self._own, self._exchange, self.backend = own, exchange, own.backend

    def __call__(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [B, this rank's columns] → [B, n]."""
        if activation != "none":
            raise ValueError(f"activation is {activation!r}, of which parts of a product know nothing; allowed: none")
        return whole(self._exchange, self._own(x, out_dtype=out_dtype), residual)
