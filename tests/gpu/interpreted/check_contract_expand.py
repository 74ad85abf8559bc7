"""The pair for small batches, `contract` and `expand`, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import DTYPES, TOLERANCE, Poisoned, banded, error, poisoned, random

from dsc_kernels import plain, reference
from dsc_kernels.gpu import contract, expand, layers
from dsc_kernels.weights import AtomBank


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, contract, expand)
    yield stand_in
    stand_in.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "atoms", "k", "rank", "options"),
    [
        (1, 1, 1, 1, 0, (False, False)),
        (3, 67, 40, 5, 0, (True, False)),
        (2, 1200, 50, 4, 0, (False, True)),
        (1, 2304, 90, 33, 0, (True, True)),
        (2, 130, 21, 3, 3, (True, True)),
    ],
)
def test_composition(
    dtype: torch.dtype, batch: int, d: int, atoms: int, k: int, rank: int, options: tuple[bool, bool]
) -> None:
    with_residual, scalar_gamma = options
    g = torch.Generator().manual_seed(d + k)
    rows = atoms * max(rank, 1)
    x, static = random(g, dtype, batch, d), random(g, torch.float32, batch, d, scale=0.1)
    u, v = (banded(reference.project(random(g, torch.float32, rows, d), 1e-6).to(dtype)) for _ in range(2))
    gamma = banded(torch.rand(1 if scalar_gamma else d, generator=g))
    residual = random(g, dtype, batch, d, scale=3) if with_residual else None
    picks = torch.stack([torch.randperm(atoms, generator=g)[:k] for _ in range(batch)]).int()
    picks[0, 0] = atoms - 1
    weights = banded(torch.rand(batch, k, generator=g))
    latent = contract.contract(x, u, banded(picks), weights, rank)
    got = expand.expand(latent, v, banded(picks), gamma, static, residual, dtype, rank)

    step = max(rank, 1)
    at = (picks.long()[:, :, None] * step + torch.arange(step)).flatten(1)
    spread = weights.double().repeat_interleave(step, dim=1)
    want = static.double() + reference.compose(x.double(), at, spread, u.double(), v.double(), gamma.double())
    if residual is not None:
        want = want + residual.double()
    assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_rows_that_were_picked_elsewhere(dtype: torch.dtype, rank: int) -> None:
    """Of which some have no weight, as those of another rank."""
    g = torch.Generator().manual_seed(rank)
    static, x = random(g, dtype, 3, 70, scale=0.1), random(g, dtype, 3, 70)
    u, v = (banded(random(g, dtype, 9 * max(rank, 1), 70)) for _ in range(2))
    picked, weights = torch.tensor([[8, 0], [3, 8], [0, 0]]), torch.tensor([[0.5, 0.0], [0.2, 0.7], [0.0, 0.0]])
    bank = AtomBank(u, v, torch.rand(70, generator=g))
    got = layers.compose_rows(static, x, picked, weights, bank, rank)
    assert got.dtype == dtype
    wide = AtomBank(u.float(), v.float(), bank.gamma)
    want = plain.compose_rows(static.float(), x.float(), picked, weights, wide, rank)
    assert error(got, want.double()) < TOLERANCE[dtype]


def test_no_tokens() -> None:
    latent = contract.contract(torch.empty(0, 8), torch.ones(5, 8), torch.empty(0, 2).int(), torch.empty(0, 2))
    none = torch.empty(0, 8)
    assert latent.shape == (0, 1, 2)
    assert expand.expand(latent, torch.ones(5, 8), torch.empty(0, 2).int(), torch.ones(8), none, None, none.dtype).shape


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"picks is torch.int64 \[2, 3\]; expected torch.int32"):
        contract.contract(torch.ones(2, 8), torch.ones(5, 8), torch.zeros(2, 3).long(), torch.ones(2, 3))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_serving_sizes(dtype: torch.dtype) -> None:
    test_composition(dtype, 4, 4096, 3000, 32, 0, (True, False))
