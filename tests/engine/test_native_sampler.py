"""The C++ sampler against the one in plain torch, whose distributions are tested for themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsc_kernels import native
from dsc_serve.engine.request import Request
from dsc_serve.engine.sampler import draw, draw_natively
from dsc_serve.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(params=native.available() or ["none"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    native.use(request.param)
    yield
    native.use("auto")


def requests(count: int, **fields: Any) -> list[Request]:
    """Requests that differ in their seed alone."""
    return [Request(str(i), 1, [0] * (1 + i % 7), SamplingParams(seed=i, **fields), 1) for i in range(count)]


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.7},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 500, "top_p": 0.95, "min_p": 0.01, "temperature": 0.8},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize(("vocabulary", "spread"), [(11, 2.0), (300, 3.0), (1999, 0.1), (1999, 4.0)])
def test_it_draws_the_same_tokens(vocabulary: int, spread: float, fields: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(400, vocabulary, generator=generator) * spread
    group = requests(400, **fields)
    same = draw_natively(logits.clone(), group) == draw(logits.clone(), group)
    # weights differ in their last bits, so a uniform number can fall just across a boundary: about once in 10⁵ draws
    assert int((~same).sum()) <= 1


def exact(weights: list[int]) -> Tensor:
    """Logits whose weights, at temperature 1, are these powers of two relative to the largest: ties are exact."""
    return torch.log(torch.tensor(weights, dtype=torch.float64)).float()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=60),
    k=st.integers(0, 60),
    numerator=st.integers(1, 16),
    seed=st.integers(0, 2**20),
)
def test_ties_at_the_boundary_are_kept_in_vocabulary_order(
    weights: list[int], k: int, numerator: int, seed: int
) -> None:
    """The kept set is the brute-force one: tokens outside it are never drawn, over many seeds."""
    top_p = numerator / 16
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: k or None]
    mass, kept = 0.0, []
    total = sum(weights[i] for i in order)
    for i in order:
        kept.append(i)
        mass += weights[i]
        if top_p < 1 and mass >= top_p * total * (1 - 1e-6):
            break
    logits = exact(weights).expand(60, -1).clone()
    group = [Request(str(i), 1, [0], SamplingParams(seed=seed * 60 + i, top_k=k, top_p=top_p), 1) for i in range(60)]
    drawn = set(draw_natively(logits, group).tolist())
    # rounding of the weights may decide whether the last token is needed
    slack = set(order[len(kept) : len(kept) + 1]) if top_p < 1 else set()
    assert drawn <= set(kept) | slack


def test_greedy_takes_the_lowest_of_equals_wherever_they_are() -> None:
    for size in (1, 15, 16, 17, 300):
        for place in range(0, size, 7):
            logits = torch.full((1, size), -1.0)
            logits[0, place:] = 2.0
            assert draw_natively(logits, requests(1, temperature=0)).item() == place


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0}], ids=str)
def test_rows_without_numbers_harm_no_other(fields: dict[str, Any]) -> None:
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    group = requests(5, **fields)
    clean = draw_natively(rows.clone(), group)
    rows[1] = -torch.inf
    rows[2, 7] = torch.nan
    rows[3, 9] = torch.inf
    got = draw_natively(rows.clone(), group)
    assert got[[0, 4]].tolist() == clean[[0, 4]].tolist()
    assert 0 <= int(got[1]) < 50
    assert got[[2, 3]].tolist() == [7, 9]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 40), -torch.inf)
    logits[:, [3, 17, 39]] = 0.0
    for fields in FILTERS:
        assert set(draw_natively(logits.clone(), requests(500, **fields)).tolist()) <= {3, 17, 39}


def test_a_flat_distribution_costs_no_sort() -> None:
    """Sixteen rows of 50,304 nearly equal logits with top-p 0.95 take less than half of a full sort."""
    logits = torch.randn(16, 50304, generator=torch.Generator().manual_seed(0)) * 0.1
    group = requests(16, temperature=0.8, top_p=0.95)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        draw_natively(logits, group)
        times.append(time.perf_counter() - start)
    sorting = time.perf_counter()
    logits.sort(dim=1)
    assert min(times) < (time.perf_counter() - sorting) / 2
