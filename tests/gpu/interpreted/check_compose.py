"""Composition against the float64 oracle, given the selection of the same launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.honest import DTYPES, MOST_DTYPES, TOLERANCE, Poisoned, banded, error, poisoned, random
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.gpu import add_norm, ffn_in, select_compose
from dsc_kernels.gpu import select as select_module
from dsc_kernels.weights import OUTPUT_ONLY, AtomBank, FfnOptions, LayerOutputs


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, ffn_in, add_norm, select_module, select_compose)
    yield stand_in
    stand_in.check()


def problem(
    dtype: torch.dtype, batch: int, d: int, atoms: int, k: int, rank: int = 0, **changes: Any
) -> dict[str, Any]:
    """What a composition is made of."""
    g = torch.Generator().manual_seed(d * atoms + k)
    x = random(g, dtype, batch, d)
    router_weight = random(g, dtype, atoms, d, scale=2 * d**-0.5)
    logits, maxima = ffn_in.router_logits(x, router_weight, None, 20.0, add_norm.rstd_of(x, 1e-5))
    rows = atoms * max(rank, 1)
    arguments = {
        "logits": banded(logits),
        "maxima": banded(maxima),
        "x": x,
        "u": banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)),
        "v": banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)),
        "gamma": banded(torch.rand(d, generator=g)),
        "static": random(g, dtype, batch, d, scale=0.1),
        "k": k,
        "eps": 1e-6,
        "rank": rank,
    }
    return {**arguments, **changes}


def oracle(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in a.items()}
    values, atoms = reference.select(wide["logits"], a["k"], 20.0)
    if a["rank"]:
        weights, signal = values.softmax(dim=1), torch.zeros(a["x"].shape[0])
        rows = (atoms[:, :, None] * a["rank"] + torch.arange(a["rank"])).flatten(1)
        spread = weights.repeat_interleave(a["rank"], dim=1)
    else:
        weights, signal = reference.coefficients(values, a["eps"])
        rows, spread = atoms, weights
    out = wide["static"] + reference.compose(wide["x"], rows, spread, wide["u"], wide["v"], wide["gamma"])
    return out, atoms, weights, signal


def composed(a: dict[str, Any], outputs: LayerOutputs = OUTPUT_ONLY) -> Tensor:
    options = FfnOptions(activation="gelu", k=a["k"], rank=a["rank"], eps=a["eps"])
    bank = AtomBank(a["u"], a["v"], a["gamma"])
    return select_compose.select_compose(a["logits"], a["maxima"], a["x"], bank, a["static"], options, outputs)


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "atoms", "k"), [(1, 1, 1, 1), (3, 67, 101, 5), (1, 129, 21, 21), (1, 384, 203, 4), (1, 530, 90, 32)]
)
def test_layer_output_and_trace(dtype: torch.dtype, batch: int, d: int, atoms: int, k: int) -> None:
    arguments = problem(dtype, batch, d, atoms, k)
    trace = LayerOutputs.everything(batch, k)
    out = composed(arguments, trace)
    want, want_atoms, want_weights, want_signal = oracle(arguments)
    assert out.dtype == dtype and error(out, want) < TOLERANCE[dtype]
    picks, weights, signal = trace.picked
    assert torch.equal(picks.long(), want_atoms)
    assert error(weights, want_weights) < 1e-6 and error(signal, want_signal) < 1e-6


def test_the_trace_changes_nothing() -> None:
    arguments = problem(torch.bfloat16, 3, 40, 50, 4)
    assert torch.equal(composed(arguments, LayerOutputs.everything(3, 4)), composed(arguments))


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(("batch", "d", "hidden", "rank"), [(1, 67, 41, 0), (2, 40, 2100, 3)])
def test_beside_the_product_that_is_added(dtype: torch.dtype, batch: int, d: int, hidden: int, rank: int) -> None:
    g = torch.Generator().manual_seed(d)
    a = problem(dtype, batch, d, 50, 3, rank)
    raised, down = random(g, dtype, batch, hidden), random(g, dtype, d, hidden, scale=hidden**-0.5)
    bias = random(g, dtype, d)
    options = FfnOptions(activation="gelu", k=a["k"], rank=a["rank"], eps=a["eps"])
    bank, trace = AtomBank(a["u"], a["v"], a["gamma"]), LayerOutputs.everything(batch, 3)
    parts = select_compose.compose_beside(a["logits"], a["maxima"], a["x"], bank, raised, down, bias, options, trace)
    assert len(parts) == 2 if hidden == 41 else len(parts) > 2, "long sums are split"
    want = oracle({**a, "static": raised.double() @ down.double().T + bias.double()})
    assert parts.dtype == torch.float32 and error(parts.sum(0), want[0]) < 3e-6
    assert torch.equal(trace.picked[0].long(), want[1])


@pytest.mark.parametrize("dtype", MOST_DTYPES)
def test_scalar_gamma_and_wide_static(dtype: torch.dtype) -> None:
    arguments = problem(dtype, 4, 70, 90, 4, gamma=banded(torch.tensor([0.7])))
    arguments["static"] = random(torch.Generator().manual_seed(0), torch.float32, 4, 70)
    out = composed(arguments)
    assert out.dtype == dtype and error(out, oracle(arguments)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rank", "k"), [(1, 2), (3, 2), (4, 1), (4, 3)])
def test_adapters_of_several_rows(rank: int, k: int) -> None:
    arguments = problem(torch.float32, 4, 70, 21, k, rank)
    out = composed(arguments)
    assert error(out, oracle(arguments)[0]) < TOLERANCE[torch.float32]


def test_zero_atoms_add_nothing() -> None:
    arguments = problem(torch.bfloat16, 3, 40, 50, 4)
    arguments["v"] = torch.zeros_like(arguments["v"])
    assert torch.equal(composed(arguments), arguments["static"])


def test_a_bad_token_touches_no_other() -> None:
    arguments = problem(torch.float32, 4, 40, 50, 4)
    clean = composed(arguments)
    arguments["logits"][1], arguments["maxima"][1] = float("nan"), -float("inf")
    arguments["x"][2, 5] = float("nan")
    got = composed(arguments)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert bool(got[1:3].isnan().all())


def test_no_tokens() -> None:
    out = composed(problem(torch.float32, 0, 40, 50, 4))
    assert out.shape == (0, 40)


def test_wrong_inputs_are_named() -> None:
    arguments = problem(torch.float32, 2, 40, 50, 4)
    with pytest.raises(ValueError, match=r"u is torch.float32 \[49, 40\]; expected .* \[50, 40\]"):
        composed({**arguments, "u": arguments["u"][:49]})
    with pytest.raises(ValueError, match="gamma has 7 values; expected 1 or 40"):
        composed({**arguments, "gamma": torch.ones(7)})


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "atoms", "k"), [(384, 1523, 4), (4096, 2000, 32), (4096, 1100, 64)])
def test_serving_sizes(dtype: torch.dtype, d: int, atoms: int, k: int) -> None:
    arguments = problem(dtype, 16, d, atoms, k)
    out = composed(arguments)
    assert error(out, oracle(arguments)[0]) < TOLERANCE[dtype]
