"""The mixture of experts that DSC is compared with: top-k of N, tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Adapted, MoeOptions, Router, SharedExpert
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.ffn.mlp import expert_weights, mlp_shapes, mlp_weights
from dsc_serve.model.ffn.picks import GatedPicks
from dsc_serve.model.ffn.router import folded_router
from dsc_serve.model.placement import Placement

SHARED_GATE = "shared_expert_gate.weight"
CHOICE_BIAS = "router.choice_bias"


class MoeFfn(GatedPicks):
    """Weights of the picked experts are their scores, softmax or sigmoid, renormalised only on request.

    A shared expert is computed in the same call.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        c = config.ffn
        assert isinstance(c, MoeConfig)
        self.k, self.device = c.experts_per_token, place.device
        router, options = router_of(config, tensors, place)
        self.layer = ops.moe(
            router,
            expert_weights(config, tensors, place, c.num_experts),
            options,
            self._shared(config, c, tensors, place),
        )

    def _shared(
        self, config: ModelConfig, c: MoeConfig, tensors: Mapping[str, Weight], place: Placement
    ) -> SharedExpert | None:
        if c.shared_expert is None:
            return None
        gate = place.tensor(tensors[SHARED_GATE]).flatten() if c.shared_expert.gated else None
        return SharedExpert(mlp_weights(config, tensors, place, "shared_expert."), gate)

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


def router_of(config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> tuple[Router, MoeOptions]:
    """The router of a layer whose FFN is a mixture, its norm folded in, and how it picks."""
    c = config.ffn
    assert isinstance(c, MoeConfig)
    router = folded_router(tensors, place, False, config.norm_eps if c.router_norm else None)
    if c.choice_bias:
        router = replace(router, choice_bias=place.tensor(tensors[CHOICE_BIAS], torch.float32))
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
