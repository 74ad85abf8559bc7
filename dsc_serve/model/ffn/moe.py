"""The mixture of experts that DSC is compared with: top-k of N, tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops, reference
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.ffn.mlp import Mlp, mlp_shapes


class MoeFfn:
    """Weights of the picked experts are their softmax probabilities over all experts, renormalised only on request."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        c = config.ffn
        assert isinstance(c, MoeConfig)
        self.config, self.norm_eps = c, config.norm_eps
        self.router = tensors["router.weight"].float().to(device)
        self.norm: tuple[Tensor, Tensor] | None = None
        if c.router_norm:
            weight, bias = tensors["router_norm.weight"], tensors["router_norm.bias"]
            self.norm = (weight.float().to(device), bias.float().to(device))
        self.experts = [Mlp(config, tensors, dtype, device, f"experts.{e}.") for e in range(c.num_experts)]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, k] and experts int64 [T, k] for x [T, d]."""
        wide = x.float()
        if self.norm is not None:
            wide = F.layer_norm(wide, wide.shape[1:], *self.norm, self.norm_eps)
        weights, experts = reference.softmax_top_k(wide @ self.router.T, self.config.experts_per_token)
        if self.config.normalize_weights:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return weights, experts

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        order, counts = ops.expert_groups(experts, self.config.num_experts)
        tokens = order // self.config.experts_per_token
        sorted_x = x[tokens]
        pieces, start = [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                pieces.append(expert(sorted_x[start : start + count]))
                start += count
        if not pieces:
            return torch.zeros_like(x)
        outputs = torch.cat(pieces).float() * weights.flatten()[order, None]
        return torch.zeros(x.shape, device=x.device).index_add_(0, tokens, outputs).to(x.dtype)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        c, d = config.ffn, config.hidden_size
        assert isinstance(c, MoeConfig)
        shapes: dict[str, tuple[int, ...]] = {"router.weight": (c.num_experts, d)}
        if c.router_norm:
            shapes |= {"router_norm.weight": (d,), "router_norm.bias": (d,)}
        for expert in range(c.num_experts):
            shapes |= mlp_shapes(config, c.expert_size, f"experts.{expert}.")
        return shapes

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        c = config.ffn
        assert isinstance(c, MoeConfig)
        matrices = 3 if config.mlp_gated else 2
        return (c.num_experts - c.experts_per_token) * matrices * config.hidden_size * c.expert_size
