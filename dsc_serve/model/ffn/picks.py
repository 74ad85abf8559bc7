"""What tokens pick in a layer, where they pick anything: atoms, experts, or adapters of a mixture of LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsc_kernels.backend import Layer
from dsc_kernels.weights import OUTPUT_ONLY, Adapted, LayerOutputs
from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig, MoloraConfig


class Picks(NamedTuple):
    """What one layer picked: atoms, or of a mixture experts or adapters."""

    atoms: Tensor  # int [T, K]: their rows
    coefficients: Tensor  # float32 [T, K]; of a mixture its gates
    signal: Tensor  # float32 [T]; of a mixture the largest of its gates


class PickShape(NamedTuple):
    """Of what a token picks how many in a layer."""

    of: str  # atoms, experts or adapters; "" where it picks nothing
    rows: int  # that there are
    per_token: int


NOTHING = PickShape("", 0, 0)


def pick_shape(config: ModelConfig) -> PickShape:
    """Of a layer of this configuration."""
    ffn = config.ffn
    if isinstance(ffn, DscConfig):
        return PickShape("atoms", ffn.num_atoms, ffn.atoms_per_token)
    if isinstance(ffn, MoeConfig):
        return PickShape("experts", ffn.num_experts, ffn.experts_per_token)
    if isinstance(ffn, MoloraConfig):
        return PickShape("adapters", ffn.num_adapters, ffn.adapters_per_token)
    return NOTHING


def picking_layers(config: ModelConfig) -> tuple[PickShape, tuple[int, ...]]:
    """What the layers pick that pick anything, and which those are; none where they differ in it."""
    shapes = {i: shape for i, kind in enumerate(config.layers) if (shape := pick_shape(kind)) != NOTHING}
    if len(set(shapes.values())) != 1:
        return NOTHING, ()
    return next(iter(shapes.values())), tuple(shapes)


class PickingFfn(Protocol):
    """A layer that can tell what was picked."""

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Picks]:
        """The output as a call gives it, bit for bit, and the picks, for x [T, d]."""

    def outputs(self, tokens: int, reporting: bool = False) -> LayerOutputs:
        """What the layer gives besides its output with so many tokens; reporting: to tell picks to `record`."""

    def record(self, picked: Sequence[Tensor]) -> Picks:
        """What was picked, of the outputs that were asked for."""


class RoutedLayer(Layer, Protocol):
    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, ...]:
        """The output, what was picked, and with which weights; there may be more."""


class GatedPicks:
    """The same of the layers of mixtures, whose router's weights are gates."""

    layer: RoutedLayer
    k: int
    device: torch.device

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Picks]:
        out, rows, gates = self.layer.routed(x, residual, adapted=adapted)[:3]
        return out, self.record((rows, gates))

    def outputs(self, tokens: int, reporting: bool = False) -> LayerOutputs:
        return LayerOutputs.everything(tokens, self.k, signal=False, device=self.device) if reporting else OUTPUT_ONLY

    def record(self, picked: Sequence[Tensor]) -> Picks:
        rows, gates = picked
        return Picks(rows, gates, gates.amax(1))
