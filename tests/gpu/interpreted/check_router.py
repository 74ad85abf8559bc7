"""Router logits and group maxima against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import DTYPES, Poisoned, banded, error, poisoned, random

from dsc_kernels import reference
from dsc_kernels.gpu import add_norm, ffn_in

INFINITE = float("inf")


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, ffn_in, add_norm)
    yield stand_in
    stand_in.check()


def router_logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tau: float, norm_eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a folded router with norm_eps, whose 1 / standard deviations are found first."""
    rstd = None if norm_eps is None else add_norm.rstd_of(x, norm_eps)
    return ffn_in.router_logits(x, weight, bias, tau, rstd)


def group_maxima(logits: torch.Tensor) -> torch.Tensor:
    known = logits.nan_to_num(-INFINITE, INFINITE, -INFINITE)
    return torch.stack([part.max(dim=1).values for part in known.split(16, dim=1)], dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "atoms", "tau"),
    [(1, 1, 1, 20.0), (3, 67, 101, 1.0), (17, 129, 16, 20.0), (70, 48, 130, 0.5), (2, 384, 203, INFINITE)],
)
@pytest.mark.parametrize("folded", [True, False])
def test_logits_and_maxima(dtype: torch.dtype, batch: int, d: int, atoms: int, tau: float, folded: bool) -> None:
    g = torch.Generator().manual_seed(batch * d + atoms)
    x, weight = random(g, dtype, batch, d), random(g, dtype, atoms, d, scale=d**-0.5)
    bias = random(g, torch.float32, atoms) if folded else None
    norm_eps = 1e-5 if folded else None
    logits, maxima = router_logits(x, weight, bias, tau, norm_eps)
    wide = None if bias is None else bias.double()
    want = reference.router_logits(x.double(), weight.double(), wide, norm_eps)
    # products of these dtypes are exact in float32: only the sums round, whatever the dtype
    assert error(logits, want.clamp(-tau, tau), want) < (3e-6 if d > 1 or not folded else 1e-2)
    assert torch.equal(maxima, group_maxima(logits))


def test_an_offset_does_not_cancel_the_variance() -> None:
    g = torch.Generator().manual_seed(0)
    x = banded(random(g, torch.float32, 5, 200) * 0.1 + 300)
    weight = random(g, torch.float32, 40, 200)
    weight = banded(weight - weight.double().mean(dim=1, keepdim=True).float())
    logits, _ = router_logits(x, weight, None, INFINITE, 1e-5)
    assert error(logits, reference.router_logits(x.double(), weight.double(), None, 1e-5)) < 1e-3


@pytest.mark.parametrize("value", [float("nan"), INFINITE])
@pytest.mark.parametrize("batch", [5, 66])
def test_bad_numbers_touch_no_other_token(value: float, batch: int) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = random(g, torch.bfloat16, batch, 48), random(g, torch.bfloat16, 70, 48)
    clean, clean_maxima = router_logits(x, weight, None, 20.0, 1e-5)
    x[2, 7] = value
    logits, maxima = router_logits(x, weight, None, 20.0, 1e-5)
    others = [i for i in range(batch) if i != 2]
    assert torch.equal(logits[others], clean[others]) and torch.equal(maxima[others], clean_maxima[others])
    assert bool(logits[2].isnan().all()) and bool((maxima[2] == -INFINITE).all())


def test_bias_alone_decides_where_it_is_nan() -> None:
    bias = torch.zeros(40)
    bias[3], bias[16:32] = float("nan"), float("nan")
    logits, maxima = router_logits(torch.ones(2, 8), torch.ones(40, 8), banded(bias), 5.0, None)
    assert torch.equal(logits.isnan(), bias.isnan().expand(2, 40))
    assert maxima.tolist() == [[5.0, -INFINITE, 5.0]] * 2


def test_no_tokens() -> None:
    logits, maxima = router_logits(torch.empty(0, 8), torch.ones(40, 8), None, 5.0, None)
    assert logits.shape == (0, 40) and maxima.shape == (0, 3)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"router is torch.float32 \[3, 7\]; expected .* \[3, 8\]"):
        router_logits(torch.ones(2, 8), torch.ones(3, 7), None, 5.0, None)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        router_logits(torch.ones(2, 8), torch.ones(3, 8, dtype=torch.int32), None, 5.0, None)
