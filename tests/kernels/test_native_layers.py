"""The C++ FFN layers against the float64 oracle, on every instruction set that this machine has.

Outputs are poisoned with NaN and lie between guard bands, so that what is not written and what is written too much both
show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.layer_parts import ffn_parts, moe_parts
from support.native_cases import CASES, DTYPES, TOLERANCE, Guarded, error, moe_layer, random, routed_layer
from torch import Tensor

from dsc_kernels import native, plain, reference

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]


def oracle(layer: dict[str, Any], x: Tensor, picks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, picks, coefficients, signal and the margin of the selection, in float64; `picks` overrules selection."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in layer.items()}
    x = x.double()
    logits = reference.router_logits(x, wide["router"], wide["router_bias"], wide["norm_eps"])
    values, atoms = reference.select(logits, layer["k"], layer["tau"])
    if picks is not None:
        atoms = picks
        values = logits.clamp(-layer["tau"], layer["tau"]).gather(1, picks)
    weights, signal = reference.coefficients(values, layer["eps"])
    up = x @ wide["up"].T
    hidden = F.gelu(up) if wide["gate"] is None else F.gelu(x @ wide["gate"].T) * up
    out = hidden @ wide["down"].T + reference.compose(x, atoms, weights, wide["u"], wide["v"], wide["gamma"])
    return out, atoms, weights, signal


def margins(layer: dict[str, Any], x: Tensor) -> Tensor:
    """Per token, how far the k-th logit is from the next."""
    logits = reference.router_logits(
        x.double(), layer["router"].double(), layer["router_bias"].double(), layer["norm_eps"]
    )
    ordered = logits.clamp(-layer["tau"], layer["tau"]).sort(dim=1, descending=True).values
    k = layer["k"]
    return ordered[:, k - 1] - ordered[:, k] if k < ordered.shape[1] else torch.full((x.shape[0],), torch.inf)


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.one_of(st.integers(0, 9), st.integers(127, 290)),
    d=st.integers(1, 67),
    atoms=st.integers(1, 150),
    k=st.integers(1, 64),
    hidden=st.integers(1, 50),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_dsc_layer(
    guarded: Guarded,
    seed: int,
    batch: int,
    d: int,
    atoms: int,
    k: int,
    hidden: int,
    gated: bool,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    layer = routed_layer(g, dtype, d, atoms, min(k, atoms), hidden, gated=gated)
    x = random(g, dtype, batch, d)
    out, picks, weights, signal = native.Ffn(**ffn_parts(**layer)).routed(x)
    if not batch:
        return
    _, atoms_wanted, _, _ = oracle(layer, x)
    sure = margins(layer, x) > 1e-3
    same = (picks.long().sort(dim=1).values == atoms_wanted.sort(dim=1).values).all(dim=1)
    assert bool(same[sure].all())
    want, _, want_weights, want_signal = oracle(layer, x, picks.long())
    wide = {name: layer[name].double().abs() for name in ("up", "gate", "down") if layer[name] is not None}
    hidden_scale = (x.double().abs() @ wide["up"].T) * (x.double().abs() @ wide["gate"].T if gated else 1)
    assert error(out, want, hidden_scale @ wide["down"].T + want.abs()) < TOLERANCE[dtype]
    assert error(weights, want_weights) < 1e-3
    assert error(signal, want_signal) < 1e-3
    assert torch.equal(out, native.Ffn(**ffn_parts(**layer))(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_added_in_the_same_call(guarded: Guarded, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    layer = routed_layer(g, dtype, 48, 70, 4, 33)
    x, residual = random(g, dtype, 5, 48), random(g, dtype, 5, 48, scale=3)
    got = native.Ffn(**ffn_parts(**layer))(x, residual)
    assert error(got, oracle(layer, x)[0] + residual.double()) < TOLERANCE[dtype]


def selection_layer(logits: Tensor, k: int, tau: float) -> native.Ffn:
    """A layer whose router's logits for the input [1.0] are the given ones."""
    zero = torch.zeros(logits.numel(), 1)
    static, bank = (torch.zeros(1, 1), None, torch.zeros(1, 1), "none"), (zero, zero, torch.ones(1))
    return native.Ffn(**ffn_parts(*static, zero, logits, *bank, k=k, tau=tau, eps=1e-6))


@CASES
@given(
    values=st.lists(st.sampled_from([-25.0, -20.0, -3.0, -0.0, 0.0, 1.5, 19.0, 20.0, 40.0]), min_size=1, max_size=90),
    k=st.integers(1, 64),
)
def test_ties_go_to_the_lowest_index_also_at_tau(guarded: Guarded, values: list[float], k: int) -> None:
    logits = torch.tensor(values)
    k = min(k, len(values))
    _, picks, _, _ = selection_layer(logits, k, 20.0).routed(torch.ones(1, 1))
    assert torch.equal(picks[0].long(), reference.select(logits[None].double(), k, 20.0)[1][0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_winners_are_found_wherever_they_are(guarded: Guarded, k: int) -> None:
    for place in range(100):
        logits = torch.linspace(-1, 1, 100).flip(0)
        winners = [(place + 7 * j) % 100 for j in range(k)]
        for rank, at in enumerate(winners):
            logits[at] = 10.0 - rank
        _, picks, _, _ = selection_layer(logits, k, 20.0).routed(torch.ones(1, 1))
        assert picks[0].tolist() == winners


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [5, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_numbers_touch_no_other_token(guarded: Guarded, value: float, batch: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    layer = native.Ffn(**ffn_parts(**routed_layer(g, dtype, 48, 70, 4, 33)))
    moe = moe_layer(g, dtype, 48, 20, 5, 2)
    x = random(g, dtype, batch, 48)
    clean, clean_moe = layer(x), native.Moe(**moe_parts(**moe))(x)
    x[2, 7] = value
    others = [i for i in range(batch) if i != 2]
    got, picks, _, _ = layer.routed(x)
    assert torch.equal(got[others], clean[others])
    assert bool(((picks >= 0) & (picks < 70)).all())
    assert not bool(torch.isfinite(got[2]).all())
    assert torch.equal(native.Moe(**moe_parts(**moe))(x)[others], clean_moe[others])


def test_a_nan_logit_ranks_below_every_number(guarded: Guarded) -> None:
    logits = torch.tensor([float("nan"), -5.0, float("nan"), 3.0, 2.0] + [-9.0] * 40)
    _, picks, weights, _ = selection_layer(logits, 3, 20.0).routed(torch.ones(1, 1))
    assert picks[0].tolist() == [3, 4, 1]
    assert bool(torch.isfinite(weights).all())


def test_zero_atoms_add_nothing(guarded: Guarded) -> None:
    g = torch.Generator().manual_seed(5)
    layer = routed_layer(g, torch.float32, 48, 30, 4, 33)
    layer["v"] = torch.zeros(30, 48)
    x = random(g, torch.float32, 4, 48)
    static = native.Ffn(**ffn_parts(layer["up"], None, layer["down"], "gelu"))
    torch.testing.assert_close(native.Ffn(**ffn_parts(**layer))(x), static(x), atol=0, rtol=0)


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.one_of(st.integers(0, 9), st.integers(127, 400)),
    d=st.integers(3, 67),
    hidden=st.integers(1, 40),
    experts=st.integers(1, 9),
    k=st.integers(1, 4),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_moe_layer(
    guarded: Guarded,
    seed: int,
    batch: int,
    d: int,
    hidden: int,
    experts: int,
    k: int,
    options: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> None:
    gated, normalize, with_residual = options
    g = torch.Generator().manual_seed(seed)
    k = min(k, experts)
    layer = {**moe_layer(g, dtype, d, hidden, experts, k), "normalize": normalize}
    if gated:
        layer["gate"] = [random(g, dtype, hidden, d, scale=d**-0.5) for _ in range(experts)]
    x = random(g, dtype, batch, d)
    residual = random(g, dtype, batch, d) if with_residual else None
    got = native.Moe(**moe_parts(**layer))(x, residual)
    if not batch:
        return
    wide = {n: [w.double() for w in layer[n]] for n in ("up", "down")}
    gates = None if not gated else [w.double() for w in layer["gate"]]
    bias = layer["router_bias"].double()
    arguments = {**layer, **wide, "gate": gates, "router_bias": None}
    oracle = plain.Moe(**moe_parts(**arguments))
    logits = reference.router_logits(x.double(), layer["router"].double(), bias, 1e-5)
    weights, picks = reference.softmax_top_k(logits, k)
    ordered = logits.sort(dim=1, descending=True).values
    sure = ordered[:, k - 1] - ordered[:, k] > 1e-3 if k < experts else torch.ones(batch, dtype=torch.bool)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    want = torch.zeros(batch, d, dtype=torch.float64) if residual is None else residual.double()
    scale = want.abs()
    for token in range(batch):
        for weight, expert in zip(weights[token], picks[token].tolist(), strict=True):
            output = oracle.experts[expert](x[token : token + 1].double())[0]
            want[token] += weight * output
            scale[token] += weight * output.norm()
    # a token whose values are nearly equal has its rounding errors multiplied by the router's norm
    assert not bool(sure.any()) or error(got[sure], want[sure], scale[sure]) < max(TOLERANCE[dtype], 3e-4)
