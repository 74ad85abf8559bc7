"""Selection: exact, ties and NaN included, and its coefficients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import Poisoned, banded, error, poisoned
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.gpu import select as module
from dsc_kernels.gpu.select import select

INFINITE = float("inf")


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, module)
    yield stand_in
    stand_in.check()


def picked(logits: Tensor, k: int, softmax: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`select` with the maxima that the router would leave."""
    known = logits.nan_to_num(-INFINITE, INFINITE, -INFINITE)
    maxima = torch.stack([part.max(dim=1).values for part in known.split(16, dim=1)], dim=1)
    return select(banded(logits), banded(maxima), k, 1e-6, softmax)


@pytest.mark.parametrize(
    ("batch", "atoms", "k"), [(1, 1, 1), (2, 15, 15), (2, 17, 3), (3, 101, 5), (1, 96, 33), (1, 700, 64), (2, 1523, 4)]
)
def test_selection_and_coefficients(batch: int, atoms: int, k: int) -> None:
    logits = torch.randn(batch, atoms, generator=torch.Generator().manual_seed(atoms)) * 3
    picks, weights, signal = picked(logits, k)
    values, want = reference.select(logits.double(), k, INFINITE)
    want_weights, want_signal = reference.coefficients(values, 1e-6)
    assert torch.equal(picks.long(), want)
    assert error(weights, want_weights) < 1e-6 and error(signal, want_signal) < 1e-6


@pytest.mark.parametrize("k", [1, 3, 8, 20])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_ties_at_the_truncation_go_to_the_lowest_index(k: int, share: float) -> None:
    g = torch.Generator().manual_seed(k)
    top = torch.where(torch.rand(3, 150, generator=g) < share, 20.0, -20.0)
    some = torch.where(torch.rand(3, 150, generator=g) < 0.2, torch.randint(-2, 3, (3, 150), generator=g), top)
    picks, _, _ = picked(some, k)
    assert torch.equal(picks.long(), reference.select(some.double(), k, 20.0)[1])


def test_zeros_of_either_sign_tie() -> None:
    logits = torch.full((1, 40), -1.0)
    logits[0, [4, 9, 20, 33]] = torch.tensor([-0.0, 0.0, 0.0, -0.0])
    assert picked(logits, 3)[0].tolist() == [[4, 9, 20]]


@pytest.mark.parametrize("k", [1, 4])
def test_winners_are_found_in_every_group(k: int) -> None:
    places = range(0, 100, 11)
    logits = torch.linspace(1, -1, 100).repeat(len(places), 1)
    winners = torch.tensor([[(place + 27 * j) % 100 for j in range(k)] for place in places])
    logits.scatter_(1, winners, torch.arange(10.0, 10 - k, -1).repeat(len(places), 1))
    assert torch.equal(picked(logits, k)[0].long(), winners)


def test_winners_crowded_in_one_group() -> None:
    logits = torch.zeros(1, 320)
    logits[0, 160:176] = torch.arange(1.0, 17.0)
    assert picked(logits, 10)[0].tolist() == [list(range(175, 165, -1))]


def test_nan_ranks_below_every_number() -> None:
    logits = torch.full((2, 50), float("nan"))
    logits[0, [3, 30, 49]] = torch.tensor([-20.0, 5.0, -20.0])
    logits[1, 1:] = -20.0
    picks, weights, signal = picked(logits, 3)
    assert picks.tolist() == [[30, 3, 49], [1, 2, 3]]
    assert bool(weights.isfinite().all()) and bool(signal.isfinite().all())


def test_nan_is_picked_last_and_shows() -> None:
    logits = torch.full((1, 37), float("nan"))
    logits[0, [20, 36]] = torch.tensor([1.0, -20.0])
    picks, weights, signal = picked(logits, 4)
    assert picks.tolist() == [[20, 36, 0, 1]]
    assert bool(weights.isnan().all()) and bool(signal.isnan().all())


def test_coefficients_at_both_ends_of_the_range() -> None:
    levels = torch.tensor([-20.0, -12.0, -5.0, -1.0, 0.0, 1.0, 19.0, 20.0])
    _, weights, signal = picked(levels[:, None].repeat(1, 3), 3)
    want_weights, want_signal = reference.coefficients(levels[:, None].repeat(1, 3).double(), 1e-6)
    assert bool(((weights - want_weights).abs() <= 2e-6 * want_weights).all())
    assert bool(((signal - want_signal).abs() <= 2e-6 * want_signal).all())


def test_softmax_of_what_was_picked() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 40
    picks, weights, signal = picked(logits, 3, softmax=True)
    values, want = reference.select(logits.double(), 3, INFINITE)
    assert torch.equal(picks.long(), want) and error(weights, values.softmax(dim=1)) < 1e-6
    assert bool((signal == 0).all())


def test_no_tokens() -> None:
    picks, weights, signal = select(torch.empty(0, 40), torch.empty(0, 3), 2, 1e-6)
    assert picks.shape == (0, 2) and weights.shape == (0, 2) and signal.shape == (0,)


@pytest.mark.parametrize("k", [0, 65, 41])
def test_k_out_of_range_is_named(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; it must be between 1 and"):
        select(torch.zeros(1, 40 if k == 41 else 100), torch.zeros(1, 3 if k == 41 else 7), k, 1e-6)
