"""Whole layers against the float64 oracle, and against their twins in `plain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.honest import MOST_DTYPES, Poisoned, banded, error, poisoned, random
from support.layer_parts import ffn_parts, moe_parts
from torch import Tensor

from dsc_kernels import plain, reference
from dsc_kernels.gpu import (
    add_norm,
    contract,
    expand,
    ffn,
    ffn_in,
    layers,
    moe,
    pick_experts,
    place_slots,
    product,
    select,
    select_compose,
)
from dsc_kernels.weights import MlpWeights

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(
        monkeypatch,
        *(add_norm, contract, expand, ffn_in, moe, pick_experts, place_slots, product, select, select_compose),
    )
    yield stand_in
    stand_in.check()


def dsc_layer(dtype: torch.dtype, d: int, atoms: int, k: int, rank: int = 0, **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(d + k)
    rows = atoms * max(rank, 1)
    arguments = {
        "up": random(g, dtype, 37, d, scale=d**-0.5),
        "gate": None,
        "down": random(g, dtype, d, 37, scale=37**-0.5),
        "activation": "gelu",
        "router": random(g, dtype, atoms, d, scale=d**-0.5),
        "router_bias": random(g, torch.float32, atoms, scale=0.3),
        "u": banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)),
        "v": banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)),
        "gamma": banded(torch.rand(d, generator=g)),
        "k": k,
        "rank": rank,
        "tau": 20.0,
        "eps": 1e-6,
        "norm_eps": 1e-5,
    }
    return {**arguments, **changes}


def oracle(layer: dict[str, Any], x: Tensor, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, coefficients and signal for these picks, in float64."""
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in layer.items()}
    x, rank = x.double(), layer["rank"]
    logits = reference.router_logits(x, wide["router"], wide["router_bias"], wide["norm_eps"])
    values = logits.clamp(-layer["tau"], layer["tau"]).gather(1, picks)
    weights, signal = reference.coefficients(values, layer["eps"])
    rows, spread = picks, weights
    if rank:
        weights, signal = values.softmax(dim=1), torch.zeros_like(signal)
        rows = (picks[:, :, None] * rank + torch.arange(rank)).flatten(1)
        spread = weights.repeat_interleave(rank, dim=1)
    static = plain.Mlp(MlpWeights(wide["up"], wide["gate"], wide["down"]), layer["activation"])(x)
    return static + reference.compose(x, rows, spread, wide["u"], wide["v"], wide["gamma"]), weights, signal


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "atoms", "k", "rank"),
    [(3, 67, 101, 5, 0), (4, 40, 50, 2, 0), (1, 2050, 70, 3, 0), (2, 70, 21, 3, 3), (1, 2064, 19, 2, 4)],
)
def test_dsc_layer(dtype: torch.dtype, batch: int, d: int, atoms: int, k: int, rank: int) -> None:
    arguments = dsc_layer(dtype, d, atoms, k, rank)
    g = torch.Generator().manual_seed(batch)
    x, residual = random(g, dtype, batch, d), random(g, dtype, batch, d)
    layer = layers.Ffn(**ffn_parts(**arguments))
    out, picks, weights, signal = layer.routed(x)
    logits = reference.router_logits(
        x.double(), arguments["router"].double(), arguments["router_bias"].double(), arguments["norm_eps"]
    )
    ordered = logits.sort(dim=1, descending=True)
    sure = ordered.values[:, k - 1] - ordered.values[:, k] > 1e-4
    same = (picks.long().sort(dim=1).values == ordered.indices[:, :k].sort(dim=1).values).all(dim=1)
    assert bool(same[sure].all())
    want, want_weights, want_signal = oracle(arguments, x, picks.long())
    assert out.dtype == dtype and error(out, want) < TOLERANCE[dtype]
    assert error(weights, want_weights) < 1e-5 and error(signal, want_signal) < 1e-5
    assert error(layer(x, residual), want + residual.double()) < TOLERANCE[dtype]


def test_the_ways_to_compose_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers.Ffn(
        **ffn_parts(**dsc_layer(torch.float32, 130, 60, 3, gate=torch.ones(37, 130), gamma=torch.tensor([0.3])))
    )
    x = random(torch.Generator().manual_seed(0), torch.float32, 2, 130)
    one_launch = layer.routed(x)
    monkeypatch.setattr(ffn, "fused", lambda tokens, d: False)
    by_cublas = layer.routed(x)
    monkeypatch.setattr(ffn, "WIDE", 1)
    for whole, other, pair in zip(one_launch, by_cublas, layer.routed(x), strict=True):
        torch.testing.assert_close(whole, other)
        torch.testing.assert_close(whole, pair)


def test_grouped_tokens_give_the_same_and_tell_their_picks() -> None:
    layer = layers.Ffn(**ffn_parts(**dsc_layer(torch.float32, 50, 30, 4)))
    x = torch.randn(9, 50, generator=torch.Generator().manual_seed(4))
    _, atoms, _, strength = layer.routed(x)
    picks, signal = torch.full((12, 4), -1, dtype=torch.int32), torch.full((12,), -1.0)
    grouped = layer(x, 2 * x, True, picks, signal)
    assert torch.equal(picks[:9], atoms) and torch.equal(signal[:9], strength)
    assert bool((picks[9:] == -1).all()) and bool((signal[9:] == -1).all())
    assert error(grouped, layer(x, 2 * x)) < TOLERANCE[torch.float32]


def test_layers_agree_with_plain_torch() -> None:
    g = torch.Generator().manual_seed(0)
    x, residual = random(g, torch.float32, 7, 50), random(g, torch.float32, 7, 50)
    arguments = dsc_layer(torch.float32, 50, 90, 4)
    mine, plainly = layers.Ffn(**ffn_parts(**arguments)), plain.Ffn(**ffn_parts(**arguments))
    assert error(mine(x, residual), plainly(x, residual)) < TOLERANCE[torch.float32]
    for got, want in zip(mine.routed(x), plainly.routed(x), strict=True):
        assert error(got, want) < TOLERANCE[torch.float32]
    dense = ffn_parts(arguments["up"], None, arguments["down"], "silu")
    torch.testing.assert_close(layers.Ffn(**dense)(x, residual), plain.Ffn(**dense)(x, residual))
    torch.testing.assert_close(
        layers.Linear(arguments["up"])(x, "gelu", None, torch.float32), plain.Linear(arguments["up"])(x, "gelu")
    )


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(("gated", "normalize", "k"), [(False, False, 2), (True, True, 3), (False, True, 1)])
def test_moe_layer(dtype: torch.dtype, gated: bool, normalize: bool, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    up, gate = ([random(g, dtype, 41, 60, scale=60**-0.5) for _ in range(5)] for _ in range(2))
    down = [random(g, dtype, 60, 41, scale=41**-0.5) for _ in range(5)]
    router_weight, bias = random(g, dtype, 5, 60, scale=60**-0.5), random(g, torch.float32, 5, scale=0.3)
    gates = gate if gated else None
    options = {"activation": "gelu", "k": k, "normalize": normalize}
    x, residual = random(g, dtype, 9, 60), random(g, dtype, 9, 60)
    layer = layers.Moe(**moe_parts(router_weight, bias, up, gates, down, 1e-5, **options))
    assert layer.up.shape[1] == layer.down.shape[2] == 48, "not padded to what wide loads need"
    weights, experts = layer.route(x)
    matrices = ([w.double() for w in ws] if ws else None for ws in (up, gates, down))
    wide = plain.Moe(**moe_parts(router_weight.double(), None, *matrices, 1e-5, **options))
    logits = reference.router_logits(x.double(), router_weight.double(), bias.double(), 1e-5)
    want_weights, want_experts = reference.softmax_top_k(logits, k)
    if normalize:
        want_weights = want_weights / want_weights.sum(dim=1, keepdim=True)
    assert torch.equal(experts.long(), want_experts) and error(weights, want_weights) < 1e-5
    want = residual.double()
    for slot in range(k):
        outputs = [wide.experts[e](row[None])[0] for e, row in zip(experts[:, slot].tolist(), x.double(), strict=True)]
        want = want + want_weights[:, slot, None] * torch.stack(outputs)
    assert error(layer(x, residual), want) < TOLERANCE[dtype]


def test_wrong_inputs_are_named() -> None:
    arguments = dsc_layer(torch.float32, 40, 50, 4)
    with pytest.raises(ValueError, match="k is 65"):
        layers.Ffn(**ffn_parts(**{**arguments, "k": 65}))
    with pytest.raises(ValueError, match="needs a router and a bank"):
        layers.Ffn(**{**ffn_parts(**arguments), "bank": None})
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 39\]; expected torch.float32 \[2, 40\]"):
        layers.Ffn(**ffn_parts(**arguments))(torch.ones(2, 39))
    with pytest.raises(ValueError, match="this layer has no router"):
        layers.Ffn(**ffn_parts(torch.ones(3, 4), None, torch.ones(4, 3), "gelu")).routed(torch.ones(1, 4))
