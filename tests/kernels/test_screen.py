"""The certified int8 router picks what scoring every row picks, for any weights and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.layer_parts import ffn_parts
from support.weight_kinds import INPUTS, WEIGHTS
from torch import Tensor

from dsc_kernels import native, reference
from dsc_kernels.native.screen import LANES, pack_int8, screen

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]
CASES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=native.available() or ["none"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    native.use(request.param)
    native.use_router("int8-certified")
    yield
    native.use_router("auto")
    native.use("auto")


def layer(router: Tensor, bias: Tensor | None = None, k: int = 4, tau: float = 20.0, norm: bool = True) -> native.Ffn:
    atoms, d = router.shape
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * d**-0.5).to(router.dtype)

    static, bank = (random(9, d), None, random(d, 9), "gelu"), (random(atoms, d), random(atoms, d), torch.ones(1))
    norm_eps = 1e-5 if norm else None
    return native.Ffn(**ffn_parts(*static, router, bias, *bank, norm_eps, k=k, tau=tau, eps=1e-6))


def scoring_all(**arguments: Any) -> native.Ffn:
    """The same layer with bounds that leave no row out."""
    made = layer(**arguments)
    errors = made.screen.errors
    assert errors is not None
    errors.fill_(torch.inf)
    return made


@CASES
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(sorted(WEIGHTS)),
    inputs=st.sampled_from(sorted(INPUTS)),
    batch=st.sampled_from([1, 3, 7, 30, 110]),
    d=st.integers(1, 90),
    atoms=st.integers(1, 400),
    k=st.integers(1, 64),
    tau=st.sampled_from([0.0, 0.5, 20.0, float("inf")]),
    biased=st.booleans(),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_screening_changes_nothing(
    seed: int,
    kind: str,
    inputs: str,
    batch: int,
    d: int,
    atoms: int,
    k: int,
    tau: float,
    biased: bool,
    norm: bool,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    router = WEIGHTS[kind](g, atoms, d).to(dtype)
    bias = torch.randn(atoms, generator=g) * 3 if biased else None
    x = INPUTS[inputs](g, batch, d).to(dtype)
    arguments = {"router": router, "bias": bias, "k": min(k, atoms), "tau": tau, "norm": norm}
    got, wanted = layer(**arguments).routed(x), scoring_all(**arguments).routed(x)
    assert torch.equal(got[1], wanted[1])
    for mine, its in zip(got, wanted, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 20, 200])
def test_the_set_is_the_exact_routers(dtype: torch.dtype, batch: int) -> None:
    """Sums of small whole numbers are exact in any order, so both routers see the same logits, ties included."""
    g = torch.Generator().manual_seed(1)
    router = torch.randint(-3, 4, (500, 64), generator=g).to(dtype)
    x = torch.randint(-3, 4, (batch, 64), generator=g).to(dtype)
    native.use_router("exact")
    exact = layer(router, norm=False, tau=30.0)
    native.use_router("int8-certified")
    screened = layer(router, norm=False, tau=30.0)
    assert screened.screened and not exact.screened
    assert torch.equal(screened.routed(x)[1], exact.routed(x)[1])
    logits = x.double() @ router.double().T
    assert torch.equal(screened.routed(x)[1].long(), reference.select(logits, 4, 30.0)[1])


@pytest.mark.parametrize("precision", ["exact", "int8-certified"])
def test_logits_truncated_at_zero_are_all_equal(precision: native.RouterPrecision) -> None:
    native.use_router(precision)
    g = torch.Generator().manual_seed(6)
    made = layer(torch.randn(300, 16, generator=g), torch.randn(300, generator=g), tau=0.0)
    assert made.routed(torch.randn(9, 16, generator=g))[1].tolist() == [[0, 1, 2, 3]] * 9


def test_few_rows_are_scored_again_and_counted() -> None:
    g = torch.Generator().manual_seed(2)
    screened = layer((torch.randn(1500, 384, generator=g) / 20).bfloat16())
    screened(torch.randn(100, 384, generator=g).bfloat16())
    screened(torch.randn(5, 384, generator=g).bfloat16())
    rows, tokens = screened.rescored
    assert tokens == 105
    assert 4 <= rows / tokens < 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [5, 150])
def test_bad_numbers_touch_no_other_token(value: float, batch: int) -> None:
    g = torch.Generator().manual_seed(3)
    screened = layer(torch.randn(70, 48, generator=g))
    x = torch.randn(batch, 48, generator=g)
    clean = screened(x)
    x[2, 7] = value
    others = [i for i in range(batch) if i != 2]
    got, picks, _, _ = screened.routed(x)
    assert torch.equal(got[others], clean[others])
    assert bool(((picks >= 0) & (picks < 70)).all())


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_rows_that_are_not_finite_are_scored_as_they_are(value: float) -> None:
    g = torch.Generator().manual_seed(4)
    router = torch.randn(100, 16, generator=g)
    router[37, 3] = value
    x = torch.randn(40, 16, generator=g)
    assert torch.equal(layer(router).routed(x)[1], scoring_all(router=router).routed(x)[1])
    infinite = layer(router).routed(x[x[:, 3] * value > 0])[1]
    assert bool((infinite[:, 0] == 37).all())


def test_an_error_is_named_where_sums_could_overflow() -> None:
    with pytest.raises(ValueError, match=r"int8-certified.* d 70000.* at most 64238"):
        screen(torch.ones(1, 70000), None, rows=None)


def test_int8_panels_hold_every_weight_once() -> None:
    weight = torch.randint(-127, 128, (37, 11), dtype=torch.int8)
    panels = pack_int8(weight)
    assert panels.shape == (3, 3, LANES, 4)
    back = panels.transpose(1, 2).reshape(3 * LANES, 12)
    assert torch.equal(back[:37, :11], weight)
    assert int(back.abs().sum()) == int(weight.abs().int().sum())
