"""A frozen decoder with a DSC branch beside its MLPs: one bank for all tenants, a bias and a scale for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig
from dsc_serve.train import losses
from dsc_serve.train.adapt.network import AdaptedNetwork, Updates
from dsc_serve.train.adapt.settings import BranchSettings
from dsc_serve.train.ffn import count, projected, router_input
from dsc_serve.train.functions import compose
from dsc_serve.train.settings import TrainError

BANK = ("router.weight", "router.bias", "router_norm.weight", "router_norm.bias", "atoms_u", "atoms_v")
ROUTER = BANK[:4]
OFF: Mapping[int, Mapping[str, Tensor]] = {}


@dataclass
class BranchTrace:
    """What the branches of one pass leave behind."""

    terms: Tensor  # weighted, summed over layers
    signal: list[Tensor]  # the mean by layer
    picks: list[Tensor]  # int64 [M] by layer


def banks_of(config: ModelConfig) -> dict[int, DscConfig]:
    """The banks of a model by layer."""
    return {i: kind.ffn for i, kind in enumerate(config.layers) if isinstance(kind.ffn, DscConfig)}


def static_config(config: ModelConfig) -> ModelConfig:
    """The same model without its branches. Raises TrainError where there are none, or its layers differ in more."""
    banks = banks_of(config)
    if not banks:
        raise TrainError(f"ffn.kind of the base is {config.ffn.kind!r}: it has no bank; `dsc-serve graft` makes it one")
    dense = DenseConfig(size=next(iter(banks.values())).static_size)
    kinds = [kind.model_copy(update={"ffn": dense}) for kind in config.layers]
    sizes = {kind.ffn.size for kind in config.layers if isinstance(kind.ffn, DenseConfig)}
    if any(kind != kinds[0] for kind in kinds) or sizes - {dense.size}:
        raise TrainError("the base's layers differ in more than their branches; such bases are served, and not trained")
    return kinds[0]


class BranchNetwork(AdaptedNetwork):
    """Computes each of N tenants' loss from the frozen weights, the bank, and the tenants' biases and scales.

    frozen: whether the bank is, too. trace: of the last pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        settings: BranchSettings,
        frozen: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        own = {name.replace(".mlp.static.", ".mlp."): tensor for name, tensor in weights.items()}
        super().__init__(static_config(config), own, 1.0, dtype, device)
        self.banks, self.settings, self.frozen = banks_of(config), settings, frozen
        self._branches: Mapping[int, Mapping[str, Tensor]] = OFF
        self._training = False
        self.trace = BranchTrace(torch.zeros(()), [], [])

    def branched(
        self, branches: Mapping[int, Mapping[str, Tensor]], windows: Tensor, training: bool = False
    ) -> list[Tensor]:
        """As `losses`. branches: by layer its bank's tensors, b [N, M] and gamma [N, d]; none: the base alone.

        training: with terms in `trace`.
        """
        self._branches, self._training = branches, training
        self.trace = BranchTrace(torch.zeros(()), [], [])
        return self.losses({}, windows)

    def _mlp(self, updates: Updates, layer: int, tenants: int, x: Tensor) -> Tensor:
        y = super()._mlp(updates, layer, tenants, x)
        own = self._branches.get(layer)
        return y if own is None else y + self._branch(self.banks[layer], own, tenants, x).view_as(y)

    def _branch(self, c: DscConfig, w: Mapping[str, Tensor], tenants: int, x: Tensor) -> Tensor:
        """x [N · rows, T, d] → the dynamic part [N, rows · T, d]."""
        flat = x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        routed = router_input(self.config, w, flat) if c.router_norm else flat
        logits = F.linear(routed, w["router.weight"], w.get("router.bias")).view(tenants, -1, c.num_atoms)
        logits = (logits + w["b"][:, None]).flatten(0, 1)
        picked = logits.detach().clamp(-c.tau, c.tau).topk(c.atoms_per_token, dim=-1, sorted=False).indices
        phi = F.softplus(logits.gather(1, picked).to(wide).clamp(-c.tau, c.tau), threshold=30.0)
        signal = phi.sum(-1, keepdim=True)
        coefficients = phi / (signal + c.eps) * signal.tanh()
        u, v = (projected(w[name].to(wide), c.eps) for name in ("atoms_u", "atoms_v"))
        y = compose(flat, u.to(x.dtype), v.to(x.dtype), picked, coefficients)
        if self._training:
            self._note(c, logits, signal, picked, u, v, tenants)
        return y.view(tenants, -1, y.shape[-1]) * w["gamma"][:, None]

    def _note(
        self, c: DscConfig, logits: Tensor, signal: Tensor, picked: Tensor, u: Tensor, v: Tensor, tenants: int
    ) -> None:
        s, trace = self.settings, self.trace
        trace.signal.append(signal.detach().mean())
        trace.picks.append(count(picked, c.num_atoms))
        if self.frozen:  # each tenant by itself: who is trained beside it does not matter
            parts = zip(logits.chunk(tenants), signal.chunk(tenants), strict=True)
            for some, strengths in parts:
                z = losses.load_and_z(some, c.tau, "raw")[1]
                trace.terms = trace.terms + s.z * z + s.budget * losses.budget(strengths, s.signal_floor)
            return
        load, z = losses.load_and_z(logits, c.tau, "raw")
        terms = s.load * load + s.z * z + s.budget * losses.budget(signal, s.signal_floor)
        # the tenants' losses are summed, and these are means over all of their tokens
        trace.terms = trace.terms + tenants * (terms + s.frame * (losses.frame(u) + losses.frame(v)))
