"""The router screened in int8: what is picked, and what a layer gives, are those of the exact router, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.decoder_steps import BLOCK, PAGES, decoder, steps
from support.honest import Poisoned, banded, poisoned, random
from support.layer_parts import ffn_parts
from support.weight_kinds import INPUTS, WEIGHTS
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.gpu import add_norm, contract, expand, ffn_in, layers, product, rescore, select, select_compose
from dsc_kernels.gpu import screen as screen_module
from dsc_kernels.gpu.add_norm import Parts
from dsc_kernels.weights import LayerOutputs, NormWeights

INFINITE, NAN = float("inf"), float("nan")
BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
LONG = pytest.mark.full


def product_by_places(a: Any, b: Any, dtype: Any) -> Any:
    """a [m, k] · b [k, n], every number of it summed in the order of k wherever it stands, as a GPU's tiles sum it.

    The interpreter's own asks BLAS, which for some processors sums an edge of a matrix in another order.
    """
    return np.add.reduce(np.multiply(a.T[:, :, None], b[:, None, :], dtype=dtype), axis=0)


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    monkeypatch.setattr(np, "matmul", product_by_places)
    stand_in = poisoned(monkeypatch, add_norm, contract, expand, ffn_in, product, rescore, select, select_compose)
    yield stand_in
    stand_in.check()
    native.use_router("auto")
    ops.use("auto")


def pair(
    router: Tensor, bias: Tensor | None = None, k: int = 4, norm_eps: float | None = 1e-5, **options: Any
) -> tuple[layers.Ffn, layers.Ffn]:
    """A layer with this router, exact and screened."""
    atoms, d = router.shape
    g, dtype = torch.Generator().manual_seed(0), router.dtype
    rows = atoms * max(options.get("rank", 0), 1)
    static = random(g, dtype, 9, d, scale=d**-0.5), None, random(g, dtype, d, 9), "gelu"
    bank = [random(g, dtype, rows, d, scale=d**-0.5) for _ in range(2)]
    gamma = banded(torch.rand(d, generator=g))
    parts = ffn_parts(
        *static, banded(router), bias, *bank, gamma, norm_eps, k=k, **{"tau": 20.0, "eps": 1e-6, **options}
    )
    made = []
    for precision in ("exact", "int8-certified"):
        native.use_router(precision)  # type: ignore[arg-type]
        made.append(layers.Ffn(**parts))
    exact, screened = made
    assert not exact.screened and exact.rescored == (0, 0)
    return exact, screened


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether outputs, atoms, coefficients and signals are the same numbers."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


CASES = [  # kind of weights, of inputs, dtype, tokens, d, atoms, k, tau, biased, folded
    ("normal", "normal", BF16, 1, 384, 203, 4, 20.0, True, True),
    ("normal", "normal", BF16, 17, 40, 64, 2, 20.0, False, True),
    ("normal", "outliers", FLOAT, 3, 67, 101, 5, 1.0, True, True),
    ("normal", "normal", HALF, 2, 130, 150, 3, INFINITE, False, False),
    ("heavy", "outliers", BF16, 3, 129, 130, 5, 20.0, False, False),
    ("uneven rows", "normal", BF16, 2, 200, 97, 6, 20.0, True, True),
    ("uneven columns", "normal", FLOAT, 2, 300, 90, 4, INFINITE, False, True),
    ("few values", "one", BF16, 4, 33, 130, 4, 0.5, False, False),
    ("equal rows", "normal", BF16, 2, 48, 150, 7, 20.0, False, True),
    ("zero", "normal", BF16, 2, 16, 100, 3, 20.0, True, True),
    ("normal", "zero", FLOAT, 2, 16, 70, 3, 20.0, True, True),
    ("normal", "normal", FLOAT, 2, 20, 70, 3, 0.0, True, True),
    ("tiny", "normal", FLOAT, 2, 24, 70, 3, 20.0, False, True),
    ("large", "large", FLOAT, 2, 24, 70, 3, INFINITE, False, False),
    ("huge", "huge", BF16, 2, 24, 70, 3, 20.0, False, False),
    ("normal", "tiny", BF16, 2, 24, 70, 3, 20.0, False, False),
    ("normal", "normal", BF16, 2, 1, 1, 1, 20.0, True, False),
    ("normal", "normal", BF16, 1, 30, 70, 20, 20.0, False, True),
    pytest.param("normal", "normal", FLOAT, 1, 64, 1100, 64, 20.0, True, True, marks=LONG),
    pytest.param("normal", "normal", BF16, 16, 129, 300, 8, 20.0, True, True, marks=LONG),
    pytest.param("heavy", "normal", BF16, 32, 60, 128, 4, 20.0, False, True, marks=LONG),
    pytest.param("normal", "normal", BF16, 1, 4096, 70, 2, 20.0, False, True, marks=LONG),
]


@pytest.mark.parametrize(("weights", "inputs", "dtype", "batch", "d", "atoms", "k", "tau", "biased", "folded"), CASES)
def test_screening_changes_nothing(
    weights: str,
    inputs: str,
    dtype: torch.dtype,
    batch: int,
    d: int,
    atoms: int,
    k: int,
    tau: float,
    biased: bool,
    folded: bool,
) -> None:
    g = torch.Generator().manual_seed(d + atoms)
    bias = torch.randn(atoms, generator=g) * 3 if biased else None
    exact, screened = pair(WEIGHTS[weights](g, atoms, d).to(dtype), bias, k, 1e-5 if folded else None, tau=tau)
    x = banded(INPUTS[inputs](g, batch, d).to(dtype))
    assert same(screened.routed(x), exact.routed(x))
    assert screened.screened and screened.screens(batch)
    rows, tokens = screened.rescored
    assert tokens == batch and batch * k <= rows <= batch * atoms


@pytest.mark.parametrize("stretch", [128, 256])
def test_programs_of_many_atoms_find_all_candidates(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them, in tiles that are not full, and all of them, in many tiles."""
    monkeypatch.setattr(rescore, "stretch_of", lambda batch, atoms: stretch)
    g = torch.Generator().manual_seed(stretch)
    for kind in ("normal", "equal rows"):
        exact, screened = pair(WEIGHTS[kind](g, 300, 64).bfloat16())
        x = random(g, BF16, 2, 64)
        assert same(screened.routed(x), exact.routed(x))
        assert (screened.rescored[0] == 2 * 300) == (kind == "equal rows")


def test_few_rows_are_scored_again_and_counted() -> None:
    g = torch.Generator().manual_seed(2)
    _, screened = pair(WEIGHTS["normal"](g, 640, 256).bfloat16() / 16)
    for batch in (2, 1):
        screened(random(g, BF16, batch, 256))
    rows, tokens = screened.rescored
    assert tokens == 3 and 4 <= rows / tokens < 25


def test_steps_of_more_tokens_are_not_screened() -> None:
    g = torch.Generator().manual_seed(3)
    exact, screened = pair(WEIGHTS["normal"](g, 40, 20).bfloat16())
    x = random(g, BF16, 33, 20)
    assert same(screened.routed(x), exact.routed(x))
    assert screened.screened and not screened.screens(33) and screened.rescored == (0, 0)


@pytest.mark.parametrize("weights", ["normal", "heavy", "uneven columns", "uneven rows"])
@pytest.mark.parametrize("dtype", [BF16, FLOAT])
def test_bounds_hold_and_are_narrow(weights: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    router, x = WEIGHTS[weights](g, 90, 200).to(dtype), random(g, dtype, 3, 200)
    bias = torch.randn(90, generator=g)
    length = add_norm.moments_of(x, None, True).length
    made = screen_module.screen(router)
    scores, _ = ffn_in.route_beside(x, router, bias, None, 20.0, None, "none", made, length)
    assert scores is not None
    logits = x.double() @ router.double().T + bias.double()
    high, least = scores[0].double(), scores[1].double()
    groups = torch.stack([part.amax(dim=1) for part in logits.split(16, dim=1)], dim=1)
    assert bool((high >= logits).all()) and bool((least <= groups).all())
    size = x.double().norm(dim=1, keepdim=True) * router.double().norm(dim=1)
    assert bool(((high - logits) / size).max() < (0.03 if weights == "normal" else 0.2))


def nearly_tied() -> tuple[tuple[layers.Ffn, layers.Ffn], Tensor]:
    """Rows that int8 holds exactly, and whose logits are all 0 but for what sums round."""
    g = torch.Generator().manual_seed(5)
    half = torch.cat([torch.randint(1, 127, (31,), generator=g), torch.tensor([127])]).float()
    levels = torch.cat([half, -half])
    router = torch.stack([levels[torch.randperm(64, generator=g)] for _ in range(150)]) * 1.5
    return pair(router, None, 4, None, tau=INFINITE), torch.full((2, 64), 0.1)


def test_what_sums_round_decides_as_it_does_without_a_screen() -> None:
    (exact, screened), x = nearly_tied()
    assert same(screened.routed(x), exact.routed(x))


def test_bounds_without_what_sums_round_would_pick_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(screen_module, "float_error", lambda d: 0.0)
    (exact, screened), x = nearly_tied()
    assert not torch.equal(screened.routed(x)[1], exact.routed(x)[1])


def test_bounds_without_what_int8_leaves_out_would_pick_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that differ by about as much as that is."""
    g = torch.Generator().manual_seed(6)
    router = WEIGHTS["equal rows"](g, 200, 128) + 0.01 * WEIGHTS["normal"](g, 200, 128)
    x = random(g, FLOAT, 4, 128)
    exact, screened = pair(router)
    wanted = exact.routed(x)
    assert screened.screen is not None
    screened.screen.errors.fill_(0.0)
    assert not torch.equal(screened.routed(x)[1], wanted[1])


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
def test_numbers_that_are_not_finite_are_where_they_would_be(value: float) -> None:
    """In a token, in a row of the router, and in the bias; other tokens notice nothing of the first."""
    g = torch.Generator().manual_seed(7)
    router, x = WEIGHTS["normal"](g, 90, 48), random(g, FLOAT, 3, 48)
    exact, screened = pair(router)
    clean = screened.routed(x)
    x[1, 7] = value
    got = screened.routed(x)
    assert same(got, exact.routed(x))
    assert all(torch.equal(one[[0, 2]], other[[0, 2]]) for one, other in zip(got, clean, strict=True))
    x[1, 7] = 1.0
    router[37, 3] = value
    exact, screened = pair(router)
    assert same(screened.routed(x), exact.routed(x))
    bias = torch.zeros(90)
    bias[3], bias[40:72] = value, value
    exact, screened = pair(WEIGHTS["normal"](g, 90, 48), bias)
    assert same(screened.routed(x), exact.routed(x))


def test_a_step_of_a_stack_is_the_same_with_what_is_told_of_it() -> None:
    g = torch.Generator().manual_seed(8)
    made = pair(WEIGHTS["normal"](g, 100, 50).bfloat16())
    residual, terms = random(g, BF16, 3, 50), random(g, torch.float32, 2, 3, 50)
    norm, found = NormWeights(random(g, BF16, 50), None, 1e-5), []
    for layer in made:
        told = LayerOutputs.everything(3, 4)
        x, parts = layer.after(residual, Parts.of(terms), norm, told)
        found.append((x, parts.terms, *told.picked))
    assert same(*found) and made[1].rescored[1] == 3


def test_grouped_tokens_and_gates_are_screened_too() -> None:
    g = torch.Generator().manual_seed(9)
    exact, screened = pair(WEIGHTS["normal"](g, 100, 40).bfloat16())
    x, residual = random(g, BF16, 5, 40), random(g, BF16, 5, 40)
    assert torch.equal(screened(x, residual, True), exact(x, residual, True))
    assert screened.rescored[1] == 5


def test_layers_that_pick_adapters_or_nothing_are_not_screened() -> None:
    router = torch.randn(20, 16, generator=torch.Generator().manual_seed(10))
    for options in ({"rank": 2}, {"silent": True}):
        _, asked = pair(router, **options)
        assert not asked.screened and not asked.screens(1)


@torch.inference_mode()
def test_a_decoder_computes_the_same() -> None:
    found = []
    for precision in ("exact", "int8-certified"):
        native.use_router(precision)  # type: ignore[arg-type]
        model = decoder("triton", "dsc", "Llama")
        assert all(layer.ffn.layer.screened == (precision != "exact") for layer in model.layers)
        caches = model.kv_caches(PAGES, BLOCK)
        found.append(tuple(model.hidden(batch, caches) for batch in steps(lengths=(2, 5, 3))))
    assert same(*found)
