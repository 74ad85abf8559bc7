"""The mixture of LoRAs (after Zadouri et al. 2024): a static MLP plus k of N low-rank adapters per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops, reference
from dsc_serve.model.config import ModelConfig, MoloraConfig
from dsc_serve.model.ffn.mlp import Mlp, mlp_shapes


class MoloraFfn:
    """y = f(x) + Σ_e g_e (x A_e) B_e over the k picked adapters, g the softmax of their logits.

    a, b: [N, r, d], adapter e's A transposed and its B.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        c = config.ffn
        assert isinstance(c, MoloraConfig)
        self.config, self.norm_eps = c, config.norm_eps
        self.static = Mlp(config, tensors, dtype, device, "static.")
        self.router = tensors["router.weight"].float().to(device)
        self.norm_weight = tensors["router_norm.weight"].float().to(device)
        self.norm_bias = tensors["router_norm.bias"].float().to(device)
        shape = (c.num_adapters, c.rank, config.hidden_size)
        self.a, self.b = (tensors[f"adapters_{p}"].view(shape).to(device=device, dtype=dtype) for p in "ab")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, k], summing to 1, and adapters int64 [T, k] for x [T, d]."""
        wide = x.float()
        normed = F.layer_norm(wide, wide.shape[1:], self.norm_weight, self.norm_bias, self.norm_eps)
        logits = normed @ self.router.T
        selected, adapters = reference.select(logits, self.config.adapters_per_token, torch.inf)
        return selected.softmax(dim=1), adapters

    def __call__(self, x: Tensor) -> Tensor:
        weights, adapters = self.route(x)
        rank_weights = weights.repeat_interleave(self.config.rank, dim=1)
        rows = (adapters[:, :, None] * self.config.rank + torch.arange(self.config.rank, device=x.device)).flatten(1)
        ones = torch.ones((), device=x.device)
        return ops.compose_add(self.static(x), x, rows, rank_weights, self.a.flatten(0, 1), self.b.flatten(0, 1), ones)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        c, d = config.ffn, config.hidden_size
        assert isinstance(c, MoloraConfig)
        adapters = (c.num_adapters, c.rank, d)
        return {
            **mlp_shapes(config, c.static_size, "static."),
            "router_norm.weight": (d,),
            "router_norm.bias": (d,),
            "router.weight": (c.num_adapters, d),
            "adapters_a": adapters,
            "adapters_b": adapters,
        }

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        c = config.ffn
        assert isinstance(c, MoloraConfig)
        return 2 * config.hidden_size * c.rank * (c.num_adapters - c.adapters_per_token)
