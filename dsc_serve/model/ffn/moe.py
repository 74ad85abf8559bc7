"""The mixture of experts that DSC is compared with: top-k of N, tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels import ops, reference
from dsc_kernels.weights import Adapted, MoeOptions, Router, SharedExpert
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights
from dsc_serve.model.ffn.picks import GatedPicks

SHARED_GATE = "shared_expert_gate.weight"
CHOICE_BIAS = "router.choice_bias"


class MoeFfn(GatedPicks):
    """Weights of the picked experts are their scores, softmax or sigmoid, renormalised only on request.

    A shared expert is computed in the same call.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        c = config.ffn
        assert isinstance(c, MoeConfig)
        self.k = c.experts_per_token
        router, options = router_of(config, tensors, device)
        prefixes = [f"experts.{e}." for e in range(c.num_experts)]
        self.layer = ops.moe(
            router,
            [mlp_weights(config, tensors, dtype, device, prefix) for prefix in prefixes],
            options,
            self._shared(config, c, tensors, dtype, device),
        )

    def _shared(
        self,
        config: ModelConfig,
        c: MoeConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> SharedExpert | None:
        if c.shared_expert is None:
            return None
        gate = tensors[SHARED_GATE].flatten().to(device=device, dtype=dtype) if c.shared_expert.gated else None
        return SharedExpert(mlp_weights(config, tensors, dtype, device, "shared_expert."), gate)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return self.layer(x, residual, adapted=adapted)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        c, d = config.ffn, config.hidden_size
        assert isinstance(c, MoeConfig)
        shapes: dict[str, tuple[int, ...]] = {"router.weight": (c.num_experts, d)}
        if c.router_norm:
            shapes |= {"router_norm.weight": (d,), "router_norm.bias": (d,)}
        if c.choice_bias:
            shapes[CHOICE_BIAS] = (c.num_experts,)
        for expert in range(c.num_experts):
            shapes |= mlp_shapes(config, c.expert_size, f"experts.{expert}.")
        if c.shared_expert is not None:
            shapes |= mlp_shapes(config, c.shared_expert.size, "shared_expert.")
            if c.shared_expert.gated:
                shapes[SHARED_GATE] = (1, d)
        return shapes

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        c = config.ffn
        assert isinstance(c, MoeConfig)
        matrices = 3 if config.mlp_gated else 2
        return (c.num_experts - c.experts_per_token) * matrices * config.hidden_size * c.expert_size


def router_of(config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Router, MoeOptions]:
    """The router of a layer whose FFN is a mixture, its norm folded in, in float32, and how it picks."""
    c = config.ffn
    assert isinstance(c, MoeConfig)
    weight, bias = tensors["router.weight"].double(), None
    if c.router_norm:
        norm_weight, norm_bias = tensors["router_norm.weight"].double(), tensors["router_norm.bias"].double()
        weight, bias = reference.fold_router_norm(weight, None, norm_weight, norm_bias)
    router = Router(
        weight.float().to(device),
        None if bias is None else bias.float().to(device),
        config.norm_eps if c.router_norm else None,
        tensors[CHOICE_BIAS].float().to(device) if c.choice_bias else None,
    )
    options = MoeOptions(
        activation=config.hidden_act,
        k=c.experts_per_token,
        normalize=c.normalize_weights,
        scoring=c.scoring,
        groups=c.groups,
        groups_used=c.groups_used,
        group_picks=c.group_picks,
        weight_scale=c.weight_scale,
    )
    return router, options
