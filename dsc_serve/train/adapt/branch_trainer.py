"""Runs that train a bank of atoms with its tenants, or further tenants of a bank that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsc_serve.model.config import DscConfig
from dsc_serve.model.graft import name_of, with_bank
from dsc_serve.model.source import ModelSource
from dsc_serve.model.tenant import write_tenant
from dsc_serve.train.adapt.branch import BANK, OFF, ROUTER, BranchNetwork, banks_of, static_config
from dsc_serve.train.adapt.network import AdaptedNetwork
from dsc_serve.train.adapt.settings import BranchSettings
from dsc_serve.train.adapt.trainer import ADAPTERS, AdapterTrainer
from dsc_serve.train.ffn import projected
from dsc_serve.train.optimiser import ROUTER_FACTOR
from dsc_serve.train.settings import TrainError

MODEL = "model"  # of a run's folder: the base with the bank that was trained


class BranchTrainer(AdapterTrainer):
    """A run as `AdapterTrainer`'s, of a base with a bank.

    frozen: the bank stays, and tenants of it are trained, each as if it were alone. Else the bank is trained with the
    tenants, all of whose tokens share its atoms, and the folder gets the model with it, of which they are tenants.
    """

    settings: BranchSettings
    network: BranchNetwork

    def __init__(
        self,
        settings: BranchSettings,
        base: Path,
        texts: Sequence[Path],
        folder: Path,
        name: str,
        time_limit: float | None = None,
        prepared: Path | None = None,
        frozen: bool = False,
    ) -> None:
        self.frozen = frozen
        name = f"{name} (frozen)" if frozen else name
        super().__init__(settings, base, texts, folder, name, time_limit, prepared)

    def _take(self, source: ModelSource) -> None:
        self.source = source
        static_config(source.config)  # raises TrainError where there is no bank
        most = source.config.max_position_embeddings
        if self.settings.length > most:
            raise TrainError(f"length is {self.settings.length}; the base's context is {most}")

    def _draw(self, weights: Mapping[str, Tensor]) -> None:
        banks, width = banks_of(self.config), self.config.hidden_size
        self.bank: dict[int, dict[str, Tensor]] = {}
        for layer in banks:
            prefix = f"model.layers.{layer}.mlp."
            own = {name: weights[f"{prefix}{name}"].float() for name in BANK if f"{prefix}{name}" in weights}
            self.bank[layer] = {n: t if self.frozen else torch.nn.Parameter(t.clone()) for n, t in own.items()}
        tenants, layers = len(self.tenants), len(banks)
        atoms = next(iter(banks.values())).num_atoms
        self.biases = torch.nn.Parameter(torch.zeros(tenants, layers, atoms))
        self.gammas = torch.nn.Parameter(torch.full((tenants, layers, width), self.settings.gamma))

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": [self.biases, self.gammas], "factor": self.settings.tenant_factor}]
        if not self.frozen:
            every = [(name, tensor) for own in self.bank.values() for name, tensor in own.items()]
            groups.append({"params": [t for name, t in every if name in ROUTER], "factor": ROUTER_FACTOR})
            groups.append({"params": [t for name, t in every if name not in ROUTER], "factor": 1.0})
        return groups

    def _made(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> AdaptedNetwork:
        return BranchNetwork(self.config, weights, self.settings, self.frozen, dtype, torch.device("cpu"))

    def _branches(self, tenants: slice, dtype: torch.dtype) -> dict[int, dict[str, Tensor]]:
        """By layer what these tenants see of the bank."""
        found = {}
        for place, (layer, own) in enumerate(self.bank.items()):
            found[layer] = {name: tensor.to(dtype) for name, tensor in own.items()}
            found[layer] |= {"b": self.biases[tenants, place].to(dtype), "gamma": self.gammas[tenants, place].to(dtype)}
        return found

    def _backward(self, network: AdaptedNetwork, windows: Tensor) -> Tensor:
        assert isinstance(network, BranchNetwork)
        kind = network.weights["model.norm.weight"].dtype
        losses = torch.stack(network.branched(self._branches(slice(len(windows)), kind), windows, training=True))
        (losses.sum() + network.trace.terms).backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _clip(self) -> Tensor:
        """Each tenant's gradient by itself, and the bank's; returns the tenants' norms before."""
        grads = [tensor.grad for tensor in (self.biases, self.gammas) if tensor.grad is not None]
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        factors = (self.settings.clip / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factors.view(-1, 1, 1))
        if not self.frozen:
            own = [tensor for bank in self.bank.values() for tensor in bank.values()]
            norms = norms + torch.nn.utils.clip_grad_norm_(own, self.settings.clip * len(self.tenants))
        return norms

    def _loss(self, tenant: int, windows: Tensor, adapted: bool) -> Tensor:
        kind = self.network.weights["model.norm.weight"].dtype
        branches = self._branches(slice(tenant, tenant + 1), kind) if adapted else OFF
        (loss,) = self.network.branched(branches, windows)
        return loss

    def _line(self, losses: Tensor, norms: Tensor, factor: float, speed: float) -> dict[str, Any]:
        trace = self.network.trace
        own = {
            "terms": round(float(trace.terms.detach()), 5),
            "gamma": round(float(self.gammas.detach().abs().max()), 4),
            "signal": [round(float(signal), 4) for signal in trace.signal],
            "used": [round(float(picks.gt(0).float().mean()), 4) for picks in trace.picks],
        }
        return super()._line(losses, norms, factor, speed) | own

    def _numbers(self) -> dict[str, Sequence[Tensor]]:
        found: dict[str, Sequence[Tensor]] = {"tenants": [self.biases, self.gammas]}
        if not self.frozen:
            found |= {f"{layer}": list(own.values()) for layer, own in self.bank.items()}
        return found

    def _write(self) -> None:
        ffn = self.config.ffn
        assert isinstance(ffn, DscConfig)
        name = ffn.bank
        if not self.frozen:
            tensors = {
                f"model.layers.{layer}.mlp.{part}": tensor.detach()
                for layer, own in self.bank.items()
                for part, tensor in own.items()
            }
            if ffn.atoms == "projected":
                atoms = {key: projected(one, ffn.eps) for key, one in tensors.items() if "atoms_" in key}
                tensors |= atoms
            name = name_of(tensors)
            with_bank(self.source, tensors, name, self.folder / MODEL)
        for i, tenant in enumerate(self.tenants):
            gamma = self.gammas[i] if ffn.gamma == "vector" else self.gammas[i].mean(1, keepdim=True)
            write_tenant(self.folder / ADAPTERS / tenant.name, self.biases[i], gamma, name)
