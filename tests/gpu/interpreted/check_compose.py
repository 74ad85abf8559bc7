"""Composition against the float64 oracle, given the selection of the same launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.honest import DTYPES, TOLERANCE, Poisoned, banded, error, poisoned, random
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.gpu import router, select_compose
from dsc_kernels.gpu import select as select_module


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, router, select_module, select_compose)
    yield stand_in
    stand_in.check()


def problem(
    dtype: torch.dtype, batch: int, d: int, atoms: int, k: int, rank: int = 0, **changes: Any
) -> dict[str, Any]:
    """Arguments of `select_compose`."""
    g = torch.Generator().manual_seed(d * atoms + k)
    x = random(g, dtype, batch, d)
    router_weight = random(g, dtype, atoms, d, scale=2 * d**-0.5)
    logits, maxima = router.router_logits(x, router_weight, None, 20.0, 1e-5)
    rows = atoms * max(rank, 1)
    arguments = {
        "logits": banded(logits),
        "maxima": banded(maxima),
        "x": x,
        "u": banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)),
        "v": banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)),
        "gamma": banded(torch.rand(d, generator=g)),
        "static": random(g, dtype, batch, d, scale=0.1),
        "residual": None,
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
    return out if a["residual"] is None else out + wide["residual"], atoms, weights, signal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "atoms", "k"), [(1, 1, 1, 1), (4, 67, 101, 5), (2, 129, 21, 21), (2, 384, 203, 4), (1, 530, 90, 32)]
)
def test_layer_output_and_trace(dtype: torch.dtype, batch: int, d: int, atoms: int, k: int) -> None:
    arguments = problem(dtype, batch, d, atoms, k)
    out, trace = select_compose.select_compose(**arguments, traced=True)
    want, want_atoms, want_weights, want_signal = oracle(arguments)
    assert out.dtype == dtype and error(out, want) < TOLERANCE[dtype]
    assert trace is not None
    assert torch.equal(trace[0].long(), want_atoms)
    assert error(trace[1], want_weights) < 1e-6 and error(trace[2], want_signal) < 1e-6


def test_the_trace_changes_nothing() -> None:
    arguments = problem(torch.bfloat16, 3, 40, 50, 4)
    traced, trace = select_compose.select_compose(**arguments, traced=True)
    alone, nothing = select_compose.select_compose(**arguments)
    assert torch.equal(alone, traced) and trace is not None and nothing is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_scalar_gamma_and_wide_static(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    arguments = problem(dtype, 4, 70, 90, 4, gamma=banded(torch.tensor([0.7])))
    arguments |= {"static": random(g, torch.float32, 4, 70), "residual": random(g, dtype, 4, 70, scale=3)}
    out, _ = select_compose.select_compose(**arguments)
    assert out.dtype == dtype and error(out, oracle(arguments)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rank", "k"), [(1, 2), (3, 2), (4, 1), (4, 3)])
def test_adapters_of_several_rows(rank: int, k: int) -> None:
    arguments = problem(torch.float32, 4, 70, 21, k, rank)
    out, _ = select_compose.select_compose(**arguments)
    assert error(out, oracle(arguments)[0]) < TOLERANCE[torch.float32]


def test_zero_atoms_add_nothing() -> None:
    arguments = problem(torch.bfloat16, 3, 40, 50, 4)
    arguments["v"] = torch.zeros_like(arguments["v"])
    assert torch.equal(select_compose.select_compose(**arguments)[0], arguments["static"])


def test_a_bad_token_touches_no_other() -> None:
    arguments = problem(torch.float32, 4, 40, 50, 4)
    clean, _ = select_compose.select_compose(**arguments)
    arguments["logits"][1], arguments["maxima"][1] = float("nan"), -float("inf")
    arguments["x"][2, 5] = float("nan")
    got, _ = select_compose.select_compose(**arguments)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert bool(got[1:3].isnan().all())


def test_no_tokens() -> None:
    out, _ = select_compose.select_compose(**problem(torch.float32, 0, 40, 50, 4))
    assert out.shape == (0, 40)


def test_wrong_inputs_are_named() -> None:
    arguments = problem(torch.float32, 2, 40, 50, 4)
    with pytest.raises(ValueError, match=r"u is torch.float32 \[49, 40\]; expected .* \[50, 40\]"):
        select_compose.select_compose(**{**arguments, "u": arguments["u"][:49]})
    with pytest.raises(ValueError, match="gamma has 7 values; expected 1 or 40"):
        select_compose.select_compose(**{**arguments, "gamma": torch.ones(7)})


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "atoms", "k"), [(384, 1523, 4), (4096, 2000, 32), (4096, 1100, 64)])
def test_serving_sizes(dtype: torch.dtype, d: int, atoms: int, k: int) -> None:
    arguments = problem(dtype, 16, d, atoms, k)
    out, _ = select_compose.select_compose(**arguments)
    assert error(out, oracle(arguments)[0]) < TOLERANCE[dtype]
