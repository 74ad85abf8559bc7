"""Which tokens the sampler may draw and how often: temperature, top-k, top-p and min-p against their definitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling_cases import assert_distributed, logits_of, many, request
from torch import Tensor

from dsc_serve import SamplingParams
from dsc_serve.engine import sampler
from dsc_serve.engine.sampler import CANDIDATES, Sampler, draw, draw_filtered, keep

WIDE = 2 * CANDIDATES + 88
ALMOST_ONE = 1 - 2.0**-53
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of `keep`, the path of kept sets that are wider than the candidates."""
    calls: list[int] = []

    def counted(weights: Tensor, k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        calls.append(weights.shape[0])
        return keep(weights, k, top_p, min_p)

    monkeypatch.setattr(sampler, "keep", counted)
    return calls


def counts(row: Tensor, params: SamplingParams, count: int, batch: int = 2048) -> Tensor:
    """How often each token is drawn from one row of logits [V], over `count` pairs of seed and position."""
    total = torch.zeros(len(row), dtype=torch.int64)
    requests = many(params, count)
    while chunk := list(itertools.islice(requests, batch)):
        total += draw(row.expand(len(chunk), -1).clone(), chunk).bincount(minlength=len(row))
    return total


def kept_set(weights: Sequence[float], k: int, top_p: float, min_p: float) -> list[int]:
    """The definition in `draw_filtered`, one token at a time; ties in vocabulary order; never a weight of 0."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:k]
    mass = sum(weights[i] for i in order)
    kept: list[int] = []
    before = 0.0
    for i in order:
        enough = top_p < 1 and before >= top_p * mass
        if enough or weights[i] == 0 or weights[i] < min_p * weights[order[0]]:
            break
        kept.append(i)
        before += weights[i]
    return sorted(kept)


def probabilities(row: Tensor, params: SamplingParams) -> Tensor:
    """What SamplingParams promises of logits [V], in float64."""
    weights = ((row.double() - row.max()) / params.temperature).exp()
    k = params.top_k if 0 < params.top_k < len(row) else len(row)
    kept = kept_set(weights.tolist(), k, params.top_p, params.min_p)
    out = torch.zeros_like(weights)
    out[kept] = weights[kept] / weights[kept].sum()
    return out


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 4},
    {"top_k": 1},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 5, "min_p": 0.05},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.25},
    {"temperature": 1.2, "top_k": 7, "top_p": 0.85, "min_p": 0.1},
    {"top_k": 500, "top_p": 0.95},
]


@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_small_vocabulary_is_drawn_as_defined(changes: dict[str, Any], wide_rows: list[int]) -> None:
    row, params = logits_of(12, 1.5), SamplingParams(**changes)
    chances = probabilities(row, params)
    observed = counts(row, params, 12_000)
    assert not wide_rows
    if params.top_k == 1:
        assert observed.argmax() == row.argmax()
        assert observed.max() == observed.sum()
    else:
        assert_distributed(observed, chances)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 40},
        {"top_k": CANDIDATES},
        {"top_p": 0.8},
        {"min_p": 0.03},
        {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_kept_sets_within_the_candidates_are_drawn_as_defined(changes: dict[str, Any], wide_rows: list[int]) -> None:
    row, params = logits_of(WIDE, 2.0), SamplingParams(**changes)
    assert changes == {} or (probabilities(row, params) > 0).sum() <= CANDIDATES
    assert_distributed(counts(row, params, 4096), probabilities(row, params))
    assert not wide_rows


@pytest.mark.parametrize(
    ("spread", "changes"),
    [
        (0.5, {"top_k": CANDIDATES + 1}),
        (0.5, {"top_k": 400}),
        (0.3, {"top_p": 0.9}),
        (0.3, {"top_k": 500, "top_p": 0.3}),
        (0.3, {"min_p": 0.3}),
        (0.3, {"temperature": 1.4, "top_k": 450, "top_p": 0.9, "min_p": 0.45}),
        (0.0, {"top_p": 0.7}),
        (0.0, {"top_k": 300}),
        (0.0, {"min_p": 1.0}),
    ],
    ids=str,
)
def test_kept_sets_wider_than_the_candidates_are_drawn_as_defined(
    spread: float, changes: dict[str, Any], wide_rows: list[int]
) -> None:
    row, params = logits_of(WIDE, spread), SamplingParams(**changes)
    chances = probabilities(row, params)
    assert_distributed(counts(row, params, 384, batch=64), chances)
    assert sum(wide_rows) == 384


def test_what_top_p_counts_is_the_mass_of_the_k_tokens(wide_rows: list[int]) -> None:
    """top_p after top_k: of 400 equal tokens half is 200, though half of all would be 300."""
    params = SamplingParams(top_k=400, top_p=0.5)
    chances = probabilities(torch.zeros(600), params)
    assert (chances > 0).tolist() == [True] * 200 + [False] * 400
    assert_distributed(counts(torch.zeros(600), params, 256, batch=64), chances)
    assert sum(wide_rows) == 256


# The kept set

LEVELS = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0])
EIGHTHS = st.sampled_from([0.125, 0.25, 0.3, 0.5, 0.7, 0.875, 1.0])
FLOORS = st.sampled_from([0.0, 0.1, 0.125, 0.25, 0.3, 0.5, 1.0])


@dataclass(frozen=True)
class Row:
    """Weights in eighths, so that every sum and share is exact, and their filter. The seed orders them."""

    size: int
    seed: int
    flat: bool
    k: int
    top_p: float
    min_p: float

    @property
    def weights(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        levels = torch.randint(2 if self.flat else len(LEVELS), (self.size,), generator=generator)
        levels[torch.randint(self.size, (1,), generator=generator)] = 0
        return LEVELS[levels]

    @property
    def kept(self) -> list[int]:
        return kept_set(self.weights.tolist(), self.k, self.top_p, self.min_p)

    def columns(self, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """k, top_p and min_p as `draw_filtered` takes them."""
        return (
            torch.full((rows, 1), self.k),
            torch.full((rows, 1), self.top_p, dtype=torch.float64),
            torch.full((rows, 1), self.min_p, dtype=torch.float32),
        )

    def drawn(self, u: Tensor) -> Tensor:
        return draw_filtered(self.weights.expand(len(u), -1), *self.columns(len(u)), u[:, None])


@st.composite
def rows(draw: st.DrawFn, low: int, high: int) -> Row:
    size = draw(st.integers(low, high))
    return Row(
        size=size,
        seed=draw(st.integers(0, 2**32)),
        flat=draw(st.booleans()),
        k=draw(st.integers(1, size)),
        top_p=draw(EIGHTHS),
        min_p=draw(FLOORS),
    )


@settings(max_examples=200, deadline=None)
@given(row=rows(1, 24))
def test_each_token_of_the_kept_set_gets_exactly_its_share(row: Row) -> None:
    """Over evenly spread u, one for each eighth that is kept: nothing is left to chance."""
    weights, kept = row.weights, row.kept
    units = int(8 * weights[kept].sum())
    u = (torch.arange(units, dtype=torch.float64) + 0.5) / units
    drawn = row.drawn(u)
    assert drawn.tolist() == sorted(drawn.tolist()), "the distribution is not inverted in vocabulary order"
    share = drawn.bincount(minlength=row.size)
    assert share.nonzero().flatten().tolist() == kept
    assert torch.equal(share[kept].float(), 8 * weights[kept])
    edges = row.drawn(torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64))
    assert edges.tolist() == [int(drawn[0]), int(drawn[-1])]


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(rows(300, 300), min_size=1, max_size=3))
def test_the_threshold_path_keeps_the_definitions_set_ties_in_vocabulary_order(batch: list[Row]) -> None:
    columns = [torch.cat(parts) for parts in zip(*(row.columns() for row in batch), strict=True)]
    weights = torch.stack([row.weights for row in batch])
    kept = keep(weights, *columns)
    for row, own in zip(batch, kept, strict=True):
        assert own.nonzero().flatten().tolist() == row.kept
        assert torch.equal(own[row.kept], row.weights[row.kept])


@settings(max_examples=60, deadline=None)
@given(row=rows(CANDIDATES + 1, 500))
def test_large_vocabularies_draw_from_the_definitions_set(row: Row) -> None:
    """Whichever path serves."""
    weights, kept = row.weights, row.kept
    places = torch.linspace(0, len(kept) - 1, 12).long()
    cumulative = weights[kept].double().cumsum(0)
    u = (cumulative - weights[kept].double() / 2)[places] / cumulative[-1]
    drawn = row.drawn(torch.cat([u, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)]))
    assert drawn.tolist() == [kept[i] for i in places] + [kept[0], kept[-1]]


@pytest.mark.parametrize(("size", "wide"), [(8, 0), (600, 1)])
def test_where_top_p_is_reached_exactly_no_further_token_is_kept(size: int, wide: int, wide_rows: list[int]) -> None:
    half, u = size // 2, (torch.arange(32, dtype=torch.float64)[:, None] + 0.5) / 32
    columns = (torch.full((32, 1), size), torch.full((32, 1), 0.5, dtype=torch.float64), torch.zeros(32, 1))
    drawn = draw_filtered(torch.ones(32, size), *columns, u)
    assert sum(wide_rows) == 32 * wide
    assert drawn.tolist() == (u * half).long().flatten().tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 300}, {"top_p": 0.999}, {"min_p": 1e-30}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("u", [0.0, 0.5, ALMOST_ONE])
def test_impossible_tokens_are_never_drawn(filters: dict[str, Any], u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of −inf, or so low that they underflow, at both ends of the vocabulary and between."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: u)
    for possible in ([3], [3, 4, 400], list(range(100, 500))):
        row = torch.full((WIDE,), -torch.inf)
        row[::2] = -1e4
        row[possible] = 0.0
        (token,) = Sampler([])(row[None].clone(), [request(SamplingParams(**filters))])
        assert token in possible


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_k": 400}, {"top_p": 0.9}], ids=str)
def test_a_row_without_finite_logits_harms_no_other(value: float, filters: dict[str, Any]) -> None:
    params = [SamplingParams(seed=i, **filters) for i in range(3)]
    logits = logits_of(3 * WIDE, 0.1).view(3, -1)
    alone = [Sampler([])(logits[i : i + 1].clone(), [request(params[i])])[0] for i in (0, 2)]
    logits[1] = value
    tokens = Sampler([])(logits, [request(p) for p in params])
    assert [tokens[0], tokens[2]] == alone
    assert 0 <= tokens[1] < WIDE


def test_masking_every_token_still_gives_a_token() -> None:
    for temperature, top_k in itertools.product((0.0, 1.0), (0, 5)):
        params = SamplingParams(temperature=temperature, top_k=top_k, min_tokens=1, stop_token_ids=tuple(range(WIDE)))
        (token,) = Sampler([0])(torch.zeros(1, WIDE), [request(params)])
        assert 0 <= token < WIDE


# Independence of the other rows, and of the other positions


@st.composite
def mixed_params(draw: st.DrawFn, size: int) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, size // 2, size - 1, size + 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.2, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        min_tokens=draw(st.sampled_from([0, 4])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.sampled_from([11, 300, 600]), spread=st.sampled_from([0.0, 0.2, 3.0]))
def test_a_rows_token_depends_on_no_other_row(data: st.DataObject, size: int, spread: float) -> None:
    params = data.draw(st.lists(mixed_params(size), min_size=2, max_size=6))
    order = data.draw(st.permutations(range(len(params))))
    logits = logits_of(len(params) * size, spread, data.draw(st.integers(0, 999))).view(len(params), size)
    requests = [request(p, prompt=[1, 2], output=[3] * i) for i, p in enumerate(params)]
    sample = Sampler([0, 1])
    together = sample(logits.clone(), requests)
    alone = [sample(logits[i : i + 1].clone(), [r])[0] for i, r in enumerate(requests)]
    shuffled = sample(logits[order].clone(), [requests[i] for i in order])
    assert together == alone
    assert [shuffled[order.index(i)] for i in range(len(params))] == alone


def test_a_kept_set_is_summed_without_its_neighbours_rounding() -> None:
    """Sums over a neighbour's tiny weights are inexact; 1,000 equal tokens still keep 700 at top_p 0.7."""
    generator = torch.Generator().manual_seed(0)
    top_p = torch.tensor([[0.0], [0.7], [0.1]], dtype=torch.float64)
    for exponent in range(20, 40):
        faint = torch.rand(1000, generator=generator) * 2.0**-exponent
        faint[0] = 1.0
        top_p[0] = 1 - 0.3 * faint[1:].double().sum() / faint.double().sum()
        weights = torch.stack([faint, torch.ones(1000), torch.ones(1000)])
        kept = keep(weights, torch.full((3, 1), 1000), top_p, torch.zeros(3, 1))
        assert (kept[1:] > 0).sum(dim=1).tolist() == [700, 100]
