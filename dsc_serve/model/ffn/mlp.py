"""The MLP that every FFN kind contains: plain or gated, in its own or an expert's place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.model.config import ModelConfig


def mlp_shapes(config: ModelConfig, size: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    d = config.hidden_size
    names = ("up_proj", "gate_proj") if config.mlp_gated else ("up_proj",)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": (size, d) for name in names}
    shapes[f"{prefix}down_proj.weight"] = (d, size)
    return shapes


class Mlp:
    """W_2 act(W_1 x), or W_2 (act(W_g x) ⊙ W_1 x) when gated; GELU in its exact form. No bias."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        prefix: str = "",
    ) -> None:
        def weight(name: str) -> Tensor:
            return tensors[f"{prefix}{name}.weight"].to(device=device, dtype=dtype)

        self.up, self.down = weight("up_proj"), weight("down_proj")
        self.gate = weight("gate_proj") if config.mlp_gated else None
        self.activation = F.gelu if config.hidden_act == "gelu" else F.silu

    def __call__(self, x: Tensor) -> Tensor:
        up = ops.linear(x, self.up)
        hidden = self.activation(up) if self.gate is None else self.activation(ops.linear(x, self.gate)) * up
        return ops.linear(hidden, self.down)
