"""The mixture of LoRAs (after Zadouri et al. 2024): a static MLP plus k of N low-rank adapters per token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Adapted, AtomBank, FfnOptions, MlpWeights, Router
from dsc_serve.model.config import ModelConfig, MoloraConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights
from dsc_serve.model.ffn.picks import GatedPicks
from dsc_serve.model.ffn.router import folded_router
from dsc_serve.model.placement import Placement, in_place


class MoloraFfn(GatedPicks):
    """y = f(x) + Σ_e g_e (x A_e) B_e over the k picked adapters, g the softmax of their logits.

    Adapter e's rows of the stored adapters_a [N, r, d] and adapters_b [N, r, d] are A_e transposed and B_e: r rank-1
    atoms that are picked together.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        c = config.ffn
        assert isinstance(c, MoloraConfig)
        self.k, self.device = c.adapters_per_token, place.device
        u, v = map(in_place, place.weights("bank", [in_atoms(tensors[f"adapters_{part}"]) for part in "ab"]))
        self.layer = self._layer(
            mlp_weights(config, tensors, place, "static."),
            FfnOptions(activation=config.hidden_act, k=c.adapters_per_token, rank=c.rank, tau=math.inf),
            folded_router(tensors, place, False, config.norm_eps),
            AtomBank(u, v, torch.ones(1, device=place.device)),
        )

    def _layer(self, mlp: MlpWeights, options: FfnOptions, router: Router, bank: AtomBank) -> ops.Ffn:
        """What computes it, or what of it needs no other rank."""
        return ops.ffn(mlp, options, router, bank)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return self.layer(x, residual, adapted=adapted)

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


def in_atoms(adapters: Weight) -> Weight:
    """Adapters [N, r, d] as rank-1 atoms [N · r, d], which quantised ones are stored as."""
    return adapters.flatten(0, 1) if isinstance(adapters, Tensor) else adapters
