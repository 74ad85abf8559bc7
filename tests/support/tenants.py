"""Random tenants of a model's bank, and models that are one tenant each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_serve.model.adapter import Adapter, BankTenant
from dsc_serve.model.config import DscConfig, ModelConfig
from dsc_serve.model.tenant import bank_of, digest_of


def random_tenant(config: ModelConfig, seed: int = 0, bias: float = 1.0, gamma: float = 1.0) -> BankTenant:
    """bias, gamma: their deviations."""
    layers, ffn = bank_of(config) or (0, None)
    assert isinstance(ffn, DscConfig)
    generator = torch.Generator().manual_seed(seed)
    b = bias * torch.randn(layers, ffn.num_atoms, generator=generator)
    return BankTenant(b, gamma * torch.randn(layers, config.hidden_size, generator=generator))


def adapter_of_tenant(name: str, tenant: BankTenant) -> Adapter:
    return Adapter(name, digest_of(tenant), "dsc", {}, tenant.nbytes, 0, tenant=tenant)


def silenced(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with an empty branch: every γ is 0."""
    return {name: torch.zeros_like(one) if name.endswith("mlp.gamma") else one for name, one in tensors.items()}


def as_tenant(
    config: ModelConfig, tensors: Mapping[str, Tensor], tenant: BankTenant, weight: float = 1.0
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model that a tenant sees, with its bias in the routers and its γ; weight: what γ is multiplied by."""
    ffn, found, place = config.ffn, dict(tensors), 0
    assert isinstance(ffn, DscConfig)
    for i, kind in enumerate(config.layers):
        if not isinstance(kind.ffn, DscConfig):
            continue
        name = f"model.layers.{i}.mlp."
        before = tensors.get(f"{name}router.bias", torch.zeros(ffn.num_atoms))
        found[f"{name}router.bias"] = before + tenant.bias[place]
        found[f"{name}gamma"] = weight * tenant.gamma[place]
        place += 1
    own = ffn.model_copy(update={"router_bias": True, "gamma": "vector"})
    return config.model_copy(update={"ffn": own}), found
