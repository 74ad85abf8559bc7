"""The DSC layer: router, static MLP and the composition of the picked rank-1 atoms (the paper's Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsc_kernels import ops, plan, reference
from dsc_kernels.quantised import QuantisedWeight, Weight
from dsc_kernels.weights import (
    OUTPUT_ONLY,
    Adapted,
    AtomBank,
    FfnOptions,
    LayerOutputs,
    MlpWeights,
    Router,
    Tuning,
)
from dsc_serve.model.config import CheckpointError, DscConfig, ModelConfig
from dsc_serve.model.ffn.mlp import mlp_shapes, mlp_weights
from dsc_serve.model.ffn.picks import Picks
from dsc_serve.model.ffn.router import folded_router
from dsc_serve.model.placement import Placement, in_place
from dsc_serve.model.quantised_tensor import as_tensor

ROUNDING = torch.finfo(torch.float16).eps  # of scales


class PickBuffers(NamedTuple):
    """Where a layer writes what it picked: picks int32 [T, K] and signal float32 [T], for at least a step's tokens."""

    picks: Tensor
    signal: Tensor


def within(bank: QuantisedWeight) -> QuantisedWeight:
    """A bank whose rows, as they are served, have norm 1 at most: rounding to levels may have made one longer."""
    norms = torch.linalg.vector_norm(bank.dequantise(torch.float64), dim=1, keepdim=True)
    factor = torch.where(norms > 1, (1 - ROUNDING) / norms, 1.0)
    minimums = None if bank.minimums is None else (bank.minimums * factor).half()
    return replace(bank, scales=(bank.scales * factor).half(), minimums=minimums)


def quantised_row(*weights: Weight) -> int | None:
    """Bytes of a row of all, where they are quantised; None elsewhere."""
    quantised = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    return sum(weight.nbytes // weight.shape[0] for weight in quantised) if quantised else None


class DscFfn:
    """The bank is projected once, here, and the router's norm folded into its weight; both then stay where they are.

    u, v: the projected bank [M, d]; gamma float32 [d] or [1]. planner: decides which steps are grouped, None: none is.
    trace: gets the picks of every step where it is set. silent: γ is 0, and only tokens with a tuning are routed.
    """

    planner: plan.Planner | None = None
    trace: PickBuffers | None = None

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        c = config.ffn
        assert isinstance(c, DscConfig)
        self.config = c
        banks = [self._bank(name, tensors[name]) for name in ("atoms_u", "atoms_v")]
        self.u, self.v = map(in_place, place.weights("bank", banks, within))
        self.gamma = place.tensor(tensors["gamma"], torch.float32)
        self.silent = not bool(as_tensor(tensors["gamma"], torch.float32).any())
        router = folded_router(tensors, place, c.router_bias, config.norm_eps if c.router_norm else None)
        self._bias = router.bias
        self._router_row = quantised_row(router.weight)
        self.layer = self._layer(
            mlp_weights(config, tensors, place, "static."),
            FfnOptions(activation=config.hidden_act, k=c.atoms_per_token, tau=c.tau, eps=c.eps, silent=self.silent),
            router,
            AtomBank(self.u, self.v, self.gamma),
        )

    def _layer(self, mlp: MlpWeights, options: FfnOptions, router: Router, bank: AtomBank) -> ops.Ffn:
        """What computes it, or what of it needs no other rank."""
        return ops.ffn(mlp, options, router, bank)

    def _bank(self, name: str, stored: Weight) -> Weight:
        """Rows of norm 1 at most. Raises CheckpointError where the checkpoint says that they are and they are not."""
        wide = as_tensor(stored, torch.float64)
        if self.config.atoms == "raw":
            wide = reference.project(wide, self.config.eps)
        norms = torch.linalg.vector_norm(wide, dim=1)
        rounding = ROUNDING if isinstance(stored, QuantisedWeight) else torch.finfo(stored.dtype).eps
        if not bool((norms <= 1 + rounding).all()):  # rows projected and then stored may exceed 1 by their rounding
            worst = int(norms.nan_to_num(torch.inf).argmax())
            raise CheckpointError(
                f"{name}: row {worst} has norm {norms[worst]:.4g} after projection, expected at most 1"
            )
        return stored if isinstance(stored, QuantisedWeight) and self.config.atoms == "projected" else wide

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Picks]:
        """The output as a call gives it, bit for bit, and the picks, for x [T, d]."""
        out, *parts = self.layer.routed(x, residual, adapted=adapted)
        return out, self.record(parts)

    def record(self, picked: Sequence[Tensor]) -> Picks:
        """What was picked, once the trace has it too, where there is one."""
        picks = Picks(*picked)
        if self.trace is not None:
            tokens = picks.signal.shape[0]
            self.trace.picks[:tokens] = picks.atoms
            self.trace.signal[:tokens] = picks.signal
        return picks

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        grouped, picks, _, signal = self.outputs(x.shape[0])
        return self.layer(x, residual, grouped, picks, signal, adapted=adapted)

    def tuning(self, bias: Tensor, gamma: Tensor) -> Tuning:
        """What a tenant has of its own here: what it adds to the router's bias, [M], and its γ [d], both float32."""
        own = bias.to(self.gamma.device)
        return Tuning(own.clone() if self._bias is None else self._bias + own, gamma.to(self.gamma.device))

    def outputs(self, tokens: int, reporting: bool = False) -> LayerOutputs:
        """What the layer gives besides its output with so many tokens; reporting: to tell picks to `record`."""
        if reporting:
            return LayerOutputs.everything(tokens, self.config.atoms_per_token, device=self.gamma.device)
        grouped = self.planner is not None and self.planner.grouped(tokens)
        if self.trace is None:
            return LayerOutputs(grouped) if grouped else OUTPUT_ONLY
        return LayerOutputs(grouped, self.trace.picks, None, self.trace.signal)

    @property
    def shape(self) -> plan.Shape:
        atoms, d = self.u.shape
        c, row = self.config, quantised_row(self.u, self.v)
        return plan.Shape(atoms, c.atoms_per_token, d, c.static_size, self.u.dtype, row, self._router_row)

    @property
    def bank_bytes(self) -> int:
        return self.u.nbytes + self.v.nbytes

    @property
    def zero_atoms(self) -> int:
        """Atoms that add nothing, whatever the token."""
        u, v = (as_tensor(bank, torch.float32).abs().amax(1) for bank in (self.u, self.v))
        return int((u * v == 0).sum())

    @property
    def rescored(self) -> tuple[int, int]:
        """Router rows that the int8 screen could not rule out, and the tokens that this was for; 0 where none is."""
        return self.layer.rescored

    @property
    def certificate(self) -> float:
        """max |γ|: no token's dynamic part can have a larger operator norm."""
        return float(self.gamma.abs().max())

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        c, d = config.ffn, config.hidden_size
        assert isinstance(c, DscConfig)
        shapes = mlp_shapes(config, c.static_size, "static.")
        shapes |= {"router.weight": (c.num_atoms, d), "atoms_u": (c.num_atoms, d), "atoms_v": (c.num_atoms, d)}
        shapes["gamma"] = (d,) if c.gamma == "vector" else (1,)
        if c.router_bias:
            shapes["router.bias"] = (c.num_atoms,)
        if c.router_norm:
            shapes |= {"router_norm.weight": (d,), "router_norm.bias": (d,)}
        return shapes

    @staticmethod
    def idle_parameters(config: ModelConfig) -> int:
        c = config.ffn
        assert isinstance(c, DscConfig)
        return 2 * config.hidden_size * (c.num_atoms - c.atoms_per_token)
