"""The mixture of experts that DSC is compared with: top-k of N, tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import MoeOptions, SharedExpert
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.ffn.mlp import expert_weights, mlp_shapes, mlp_weights
from dsc_serve.model.ffn.router import folded_router
from dsc_serve.model.placement import Placement

SHARED_GATE = "shared_expert_gate.weight"


class MoeFfn:
    """Weights of the picked experts are their softmax probabilities over all experts, renormalised only on request.

    A shared expert is computed in the same call.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        c = config.ffn
        assert isinstance(c, MoeConfig)
        self.layer = ops.moe(
            folded_router(tensors, place, False, config.norm_eps if c.router_norm else None),
            expert_weights(config, tensors, place, c.num_experts),
            MoeOptions(activation=config.hidden_act, k=c.experts_per_token, normalize=c.normalize_weights),
            self._shared(config, c, tensors, place),
        )

    def _shared(
        self, config: ModelConfig, c: MoeConfig, tensors: Mapping[str, Weight], place: Placement
    ) -> SharedExpert | None:
        if c.shared_expert is None:
            return None
        gate = place.tensor(tensors[SHARED_GATE]).flatten() if c.shared_expert.gated else None
        return SharedExpert(mlp_weights(config, tensors, place, "shared_expert."), gate)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer(x, residual)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        c, d = config.ffn, config.hidden_size
        assert isinstance(c, MoeConfig)
        shapes: dict[str, tuple[int, ...]] = {"router.weight": (c.num_experts, d)}
        if c.router_norm:
            shapes |= {"router_norm.weight": (d,), "router_norm.bias": (d,)}
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
