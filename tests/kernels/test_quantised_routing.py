"""Quantised routers and banks of layers: centred where they must be, held once, and of the size that they have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_kernels import native, ops, reference
from dsc_kernels.native.screen import ScreenedRows
from dsc_kernels.quantised import QuantisedWeight, Weight
from dsc_kernels.sketch import Sketch
from dsc_serve.engine.routing_reporter import RoutingReporter
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.ffn.molora import MoloraFfn
from dsc_serve.model.ffn.router import folded_router
from dsc_serve.model.placement import Placement
from dsc_serve.model.rounding import rounded

COMPILED = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
D, ATOMS = 64, 37
PREFIX = "model.layers.0.mlp."


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(router: Weight, norm: Tensor | None = None) -> Weight:
    """The router that is served behind a norm of this weight."""
    scale = torch.ones(D) if norm is None else norm
    tensors = {"router.weight": router, "router_norm.weight": scale, "router_norm.bias": torch.zeros(D)}
    return folded_router(tensors, Placement(torch.float32, torch.device("cpu")), False, 1e-5).weight


@pytest.mark.parametrize("mean", [0.05, 0.5, -3.0])
def test_a_quantised_router_whose_rows_are_not_centred_is(mean: float) -> None:
    """Its norm takes the mean off inputs, and logits of what is served must not tell that it was there."""
    stored = rounded(random(ATOMS, D) + mean, 8)
    served = placed(stored)
    assert isinstance(served, QuantisedWeight)
    x = random(9, D, seed=1).double() + 20
    wide = stored.whole(torch.float64)
    want = F.layer_norm(x, (D,), eps=1e-5) @ wide.T
    got = reference.router_logits(x, served.whole(torch.float64), None, 1e-5)
    # each number is off by half a step, and their sum, which the inputs' mean multiplies, by as much for each
    steps = served.scales.double().repeat_interleave(32, 1).sum(1) / 2
    assert bool(((got - want).abs() <= steps * (x * reference.reciprocal_std(x, 1e-5)).abs().amax(1)[:, None]).all())
    if abs(mean) >= 0.5:
        assert float((reference.router_logits(x, wide, None, 1e-5) - want).abs().min()) > 10


def test_one_that_is_centred_but_for_its_rounding_stays_as_it_is() -> None:
    wide = random(ATOMS, D)
    for factor in (1e-3, 1, 50):
        stored = rounded((wide - wide.mean(1, keepdim=True)) * factor, 8)
        served = placed(stored)
        assert isinstance(served, QuantisedWeight)
        assert torch.equal(served.values, stored.values) and torch.equal(served.scales, stored.scales)
    scaled = placed(stored, torch.full((D,), 0.5))
    assert isinstance(scaled, QuantisedWeight) and float((scaled.whole() * 2 - stored.whole()).abs().max()) < 1


def layer(kind: str) -> DscFfn | MoloraFfn:
    """A layer whose router and bank are quantised, in groups of 32."""
    config = small_config(kind, hidden_size=D)
    wide = {name.removeprefix(PREFIX): own for name, own in wide_tensors(config).items() if name.startswith(PREFIX)}
    tensors: dict[str, Weight] = dict(wide)
    for name in ("router.weight", "atoms_u", "atoms_v", "adapters_a", "adapters_b"):
        if name in wide:
            own = wide[name].flatten(0, -2)
            tensors[name] = rounded(0.9 * reference.project(own, 1e-6) if "atoms" in name else own, 8)
    if kind == "dsc":
        config = config.model_copy(update={"ffn": config.ffn.model_copy(update={"atoms": "projected"})})
    tensors |= {"router_norm.weight": torch.ones(D), "router_norm.bias": torch.zeros(D)}
    made: Any = DscFfn if kind == "dsc" else MoloraFfn
    return made(config, tensors, Placement(torch.float32, torch.device("cpu")))


@COMPILED
def test_the_rows_of_a_quantised_bank_are_held_once() -> None:
    ffn = layer("dsc")
    assert isinstance(ffn, DscFfn) and isinstance(ffn.layer, native.Ffn)
    rows = [own for own in ffn.layer._kept if isinstance(own, ScreenedRows)]
    kept = [own.values.data_ptr() for own in rows if own.values is not None]
    scales = [each.data_ptr() for own in rows for each in own.scales]
    for bank in (ffn.u, ffn.v):
        assert isinstance(bank, QuantisedWeight)
        assert bank.values.data_ptr() in kept and bank.scales.data_ptr() in scales


@COMPILED
def test_rows_that_do_not_lie_in_one_piece_are_copied() -> None:
    bank = rounded(random(40, D), 8)
    apart = replace(bank, values=bank.values.T.contiguous().T, scales=bank.scales.T.contiguous().T)
    got, want = (native.packing.bank_rows("u", own) for own in (apart, bank))
    assert got.values is not None and got.values.is_contiguous()
    assert want.values is not None and torch.equal(got.values, want.values)
    assert all(torch.equal(*pair) and pair[0].is_contiguous() for pair in zip(got.scales, want.scales, strict=True))


@COMPILED
def test_rows_of_a_mixture_of_loras_are_in_memory_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsc_serve.model import placement

    made: list[int] = []

    def resident(tensor: Tensor) -> Tensor:
        made.append(own.data_ptr() if (own := tensor.clone()).numel() else 0)
        return own

    monkeypatch.setattr(placement, "resident", resident)
    ffn = layer("molora")
    rows = [own for own in ffn.layer._kept if isinstance(own, ScreenedRows)]  # type: ignore[attr-defined]
    kept = [own.values.data_ptr() for own in rows if own.values is not None]
    assert len(made) >= 2 and all(own in made for own in kept)


@pytest.mark.parametrize("kernels", ["plain", pytest.param("auto", marks=COMPILED)])
def test_sizes_are_those_of_the_levels_and_scales(kernels: str) -> None:
    """8 bits in groups of 32 with a float16 scale: 34 bytes for 32 numbers, whatever the layer computes in."""
    ops.use(kernels)
    ffn = layer("dsc")
    assert isinstance(ffn, DscFfn)
    row = D + D // 32 * 2
    assert (ffn.shape.row, ffn.shape.router_bytes) == (2 * row, ATOMS * row)
    assert ffn.bank_bytes == 2 * ATOMS * row
    sketch = Sketch(1, ATOMS, 3, 61)
    assert RoutingReporter([ffn], sketch)._router_bytes(0, 0) == 0
    sketch.steps = 5
    sketch.tokens = 10
    reporter = RoutingReporter([ffn], sketch)
    assert reporter._router_bytes(0, 0) == 5 * ATOMS * row
    assert reporter._router_bytes(40, 10) == 5 * ATOMS * D + 4 * 10 * row
