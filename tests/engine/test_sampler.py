"""The sampler against its definition: distributions, kept sets, independence, penalties and log probabilities.

About 120 chi-square tests with fixed seeds: each asks for p > 1e-5, so a sampler that is right passes all of them for
all but one in 800 choices of seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine import sampler
from dsc_serve.engine.output import TokenLogprobs
from dsc_serve.engine.request import Request
from dsc_serve.engine.sampler import CANDIDATES, Sampler, draw, draw_filtered, keep, logprobs, uniform

P_VALUE = 1e-5
GOLDEN = 0x9E3779B97F4A7C15
WIDE = 2 * CANDIDATES + 88
ALMOST_ONE = 1 - 2.0**-53


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of `keep`, the path of kept sets that are wider than the candidates."""
    calls: list[int] = []

    def counted(weights: Tensor, k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        calls.append(weights.shape[0])
        return keep(weights, k, top_p, min_p)

    monkeypatch.setattr(sampler, "keep", counted)
    return calls


def request(params: SamplingParams, prompt: Sequence[int] = (0,), output: Sequence[int] = ()) -> Request:
    return Request("r", len(prompt), [*prompt, *output], params, max_tokens=64)


def many(params: SamplingParams, count: int) -> Iterator[Request]:
    """Requests of all different (seed, position): consecutive seeds, 16 positions each."""
    histories = [[0] * position for position in range(1, 17)]
    for i in range(count):
        history = histories[i % 16]
        made = Request("r", len(history), history, params, max_tokens=64)
        made.seed = i // 16
        yield made


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


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Chi-square of observed counts against expected ones, neighbours pooled until 10 are expected of each pool."""
    pools, start = [], 0
    for end in range(1, len(expected) + 1):
        if expected[start:end].sum() >= 10:
            pools.append((start, end))
            start = end
    pools[-1] = (pools[-1][0], len(expected))
    assert len(pools) >= 2
    seen, due = (torch.stack([t[a:b].sum() for a, b in pools]).double() for t in (observed, expected))
    statistic = ((seen - due) ** 2 / due).sum()
    return float(torch.special.gammaincc(torch.tensor((len(pools) - 1) / 2, dtype=torch.float64), statistic / 2))


def assert_distributed(observed: Tensor, chances: Tensor) -> None:
    """Observed counts follow the chances, and what cannot be drawn was not."""
    assert observed[chances == 0].sum() == 0
    assert p_value(observed, chances * observed.sum()) > P_VALUE


def logits_of(size: int, spread: float, seed: int = 0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


# The distribution that is drawn from

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
    chosen = share > 0
    assert torch.equal(share[chosen].float(), 8 * weights[chosen])
    assert weights[chosen].sort().values.tolist() == sorted(weights[kept].tolist())
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
    """Whichever path serves: the kept weights are the definition's, and above their least the tokens too."""
    weights, kept = row.weights, row.kept
    places = torch.linspace(0, len(kept) - 1, 12).long()
    cumulative = weights[kept].double().cumsum(0)
    u = (cumulative - weights[kept].double() / 2)[places] / cumulative[-1]
    drawn = row.drawn(torch.cat([u, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)]))
    least = weights[kept].min()
    assert (weights[drawn] >= least).all()
    tied = (weights == least).sum() > (weights[kept] == least).sum()
    if not tied:
        assert drawn.tolist() == [kept[i] for i in places] + [kept[0], kept[-1]]


@pytest.mark.parametrize(("size", "wide"), [(8, 0), (600, 1)])
def test_where_top_p_is_reached_exactly_no_further_token_is_kept(size: int, wide: int, wide_rows: list[int]) -> None:
    half, u = size // 2, (torch.arange(32, dtype=torch.float64)[:, None] + 0.5) / 32
    columns = (torch.full((32, 1), size), torch.full((32, 1), 0.5, dtype=torch.float64), torch.zeros(32, 1))
    drawn = draw_filtered(torch.ones(32, size), *columns, u)
    assert sum(wide_rows) == 32 * wide
    if wide:
        assert drawn.tolist() == (u * half).long().flatten().tolist()
    else:
        assert sorted(drawn.bincount().tolist())[-half:] == [32 // half] * half
        assert len(drawn.unique()) == half


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


def test_the_seed_and_position_decide_whatever_the_rest_of_the_request_is() -> None:
    params = SamplingParams(seed=11, top_p=0.9)
    row = logits_of(50, 0.5)[None]
    histories = [([1, 2, 3], []), ([4], [5, 6]), ([7, 8], [9])]
    tokens = {Sampler([])(row.clone(), [request(params, *history)])[0] for history in histories}
    assert len(tokens) == 1
    by_position = [Sampler([])(row.clone(), [request(params, [0] * n)])[0] for n in range(1, 41)]
    by_seed = [Sampler([])(row.clone(), [request(SamplingParams(seed=s))])[0] for s in range(40)]
    assert len(set(by_position)) > 15
    assert len(set(by_seed)) > 15


def test_a_negative_seed_is_one_modulo_two_to_the_64() -> None:
    assert request(SamplingParams(seed=-1)).seed == 2**64 - 1
    assert request(SamplingParams(seed=-(2**63))).seed == 2**63


def test_without_a_seed_each_request_draws_its_own() -> None:
    assert len({request(SamplingParams()).seed for _ in range(20)}) == 20


# The uniform numbers


def even(values: Sequence[float], bins: int = 32) -> float:
    """p-value of values in [0, 1) being uniform."""
    numbers = torch.tensor(values, dtype=torch.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    observed = (numbers * bins).long().bincount(minlength=bins)
    return p_value(observed, torch.full((bins,), len(values) / bins, dtype=torch.float64))


def independent(first: Sequence[float], second: Sequence[float], bins: int = 8) -> float:
    """p-value of pairs being uniform in the unit square."""
    cells = [int(a * bins) * bins + int(b * bins) for a, b in zip(first, second, strict=True)]
    expected = torch.full((bins * bins,), len(cells) / bins**2, dtype=torch.float64)
    return p_value(torch.tensor(cells).bincount(minlength=bins * bins), expected)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 2**32, 2**63, 2**64 - 2, 2**64 - 1, GOLDEN, 2**64 - GOLDEN])
def test_each_seed_gives_even_and_independent_numbers(seed: int) -> None:
    numbers = [uniform(seed, position) for position in range(4096)]
    assert even(numbers) > P_VALUE
    for lag in (1, 2, 7):
        starts = [i for i in range(len(numbers) - lag) if (i // lag) % 2 == 0]  # pairs that share no number
        assert independent([numbers[i] for i in starts], [numbers[i + lag] for i in starts]) > P_VALUE
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("stride", [1, 2, 2**11, 2**32, 2**48, GOLDEN], ids=hex)
@pytest.mark.parametrize("position", [1, 1000])
def test_each_position_is_even_over_seeds_and_neighbouring_seeds_are_independent(stride: int, position: int) -> None:
    numbers = [uniform((2**64 - 5 + i * stride) % 2**64, position) for i in range(4096)]
    assert even(numbers) > P_VALUE
    assert independent(numbers[::2], numbers[1::2]) > P_VALUE
    later = [uniform((2**64 - 5 + i * stride) % 2**64, position + 1) for i in range(4096)]
    assert independent(numbers, later) > P_VALUE
    assert independent(numbers[1:], later[:-1]) > P_VALUE


def test_choices_share_no_number_at_any_position() -> None:
    """n choices are independent: no choice's sequence is another's, moved along."""
    params = SamplingParams(seed=7, n=16)
    sequences = [[uniform(params.for_choice(i).seed or 0, p) for p in range(512)] for i in range(params.n)]
    assert len(set(itertools.chain(*sequences))) == 16 * 512
    for shift in (0, 1, 2):
        pairs = [(a[: 512 - shift], b[shift:]) for a, b in itertools.pairwise(sequences)]
        first, second = (list(itertools.chain(*side)) for side in zip(*pairs, strict=True))
        assert independent(first, second) > P_VALUE
        assert independent(second, first) > P_VALUE


# Adjustments of the logits

VOCABULARY = 13
EOS = (5, 6)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


def adjusted_by_hand(row: list[float], prompt: list[int], output: list[int], p: SamplingParams) -> list[float]:
    out = []
    for token, logit in enumerate(row):
        value = logit + p.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        value -= output.count(token) * p.frequency_penalty
        if token in output:
            value -= p.presence_penalty
        ends = token in p.stop_token_ids or (token in EOS and not p.ignore_eos)
        out.append(-math.inf if ends and len(output) < p.min_tokens else value)
    return out


@settings(max_examples=60, deadline=None)
@given(
    prompt=TOKENS.filter(bool),
    output=TOKENS,
    seed=st.integers(0, 2**32),
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, 2.0, -1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7, 100.0]),
        logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=4),
        min_tokens=st.integers(0, 14),
        stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=3).map(tuple),
        ignore_eos=st.booleans(),
    ),
)
def test_adjustments_are_those_of_a_plain_loop(
    prompt: list[int], output: list[int], seed: int, params: SamplingParams
) -> None:
    row = logits_of(VOCABULARY, 4.0, seed)
    logits = row[None].clone()
    (token,) = Sampler(EOS)(logits, [request(params, prompt, output)])
    want = torch.tensor(adjusted_by_hand(row.tolist(), prompt, output, params))
    torch.testing.assert_close(logits[0], want, rtol=1e-5, atol=1e-5)
    assert token == logits[0].argmax()


def test_bias_minus_100_bans_and_100_forces() -> None:
    row = logits_of(20, 3.0)
    best = int(row.argmax())
    for temperature in (0.0, 1.0, 2.0):
        banned = SamplingParams(temperature=temperature, logit_bias={best: -100.0})
        forced = SamplingParams(temperature=temperature, logit_bias={int(row.argmin()): 100.0})
        chunk = list(many(banned, 2000))
        assert best not in Sampler([])(row.expand(2000, -1).clone(), chunk)
        chunk = list(many(forced, 2000))
        assert set(Sampler([])(row.expand(2000, -1).clone(), chunk)) == {int(row.argmin())}


def test_penalties_and_masks_shape_what_is_drawn() -> None:
    row, output = logits_of(VOCABULARY, 1.0), [3, 3, 4]
    params = SamplingParams(
        temperature=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
        logit_bias={1: 1.5, 2: -1.0},
        min_tokens=4,
        stop_token_ids=(7,),
    )
    want = torch.tensor(adjusted_by_hand(row.tolist(), [0, 1], output, params), dtype=torch.float64)
    requests = [request(params, [0, 1], output) for _ in range(4000)]
    for seed, each in enumerate(requests):
        each.seed = seed
    tokens = torch.tensor(Sampler(EOS)(row.expand(4000, -1).clone(), requests))
    assert_distributed(tokens.bincount(minlength=VOCABULARY), (want / 0.9).softmax(dim=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_ends_until_they_are_reached(temperature: float) -> None:
    row = torch.full((VOCABULARY,), -20.0)
    row[[EOS[0], 9]] = torch.tensor([20.0, 30.0])
    params = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(9,), seed=0)
    for size in range(5):
        for ignore_eos in (False, True):
            own = SamplingParams(
                temperature=temperature, min_tokens=3, stop_token_ids=(9,), seed=0, ignore_eos=ignore_eos
            )
            (token,) = Sampler(EOS)(row[None].clone(), [request(own, [1], [2] * size)])
            assert (token == 9) == (size >= 3)
            assert (token == EOS[0]) == (size < 3 and ignore_eos)
    (token,) = Sampler(EOS)(row[None].clone(), [request(params, [1] * 5, [])])
    assert token not in (*EOS, 9), "the prompt does not count"


# Log probabilities


@pytest.mark.parametrize("size", [7, 61, 5000])
def test_logprobs_are_the_float64_log_softmax(size: int) -> None:
    top = [0, 1, 5, 20, 20]
    logits = logits_of(len(top) * size, 5.0).view(len(top), size)
    tokens = [0, size - 1, 3, int(logits[3].argmax()), int(logits[4].argmin())]
    want = logits.double().log_softmax(dim=1)
    for i, entry in enumerate(logprobs(logits, tokens, top)):
        check(entry, tokens[i], top[i], want[i], 1e-5)
    assert [len(entry.top) for entry in logprobs(logits, tokens, [0] * len(top))] == [0] * len(top)
    assert logprobs(logits[:0], [], []) == []


def check(entry: TokenLogprobs, token: int, top: int, want: Tensor, tolerance: float) -> None:
    """One report against the log probabilities [V]: the token, its value, and `top` alternatives in falling order."""
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(want[token]), abs=tolerance)
    ids, values = [i for i, _ in entry.top], [v for _, v in entry.top]
    assert len(ids) == len(set(ids)) == min(top, len(want))
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(want[ids].tolist(), abs=tolerance)
    assert values == pytest.approx(want.topk(len(ids)).values.tolist(), abs=tolerance)
    if token in ids:
        assert values[ids.index(token)] == entry.logprob


SETTINGS: dict[str, dict[str, int]] = {
    "roomy": {},
    "three tokens a step": {"step_tokens": 3, "max_running": 3},
    "preempted": {"kv_tokens": 64, "block_size": 4, "step_tokens": 16, "max_running": 8},
    "preempted, in chunks": {"kv_tokens": 52, "block_size": 4, "step_tokens": 5, "max_running": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_reports_the_models_own_distribution_once_for_each_position(
    name: str, small_model: Callable[..., Path]
) -> None:
    """Before temperature, penalties and bias; each prompt position once, however often it is computed."""
    folder = str(small_model("dense"))
    generator = torch.Generator().manual_seed(2)
    sizes = [1, 2, 19, 8, 27, 13, 3, 16]
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in sizes]
    tops: list[tuple[int | None, int | None]] = [(5, 3), (0, 0), (20, 20), (None, 2), (2, None), (1, 1), (4, 0), (0, 4)]
    params = [
        SamplingParams(
            temperature=0.0 if i == 5 else 0.7,
            top_k=30,
            presence_penalty=1.0,
            repetition_penalty=1.4,
            logit_bias={7: 3.0, 9: -100.0},
            seed=i,
            max_tokens=20,
            ignore_eos=True,
            logprobs=output_top,
            prompt_logprobs=prompt_top,
        )
        for i, (output_top, prompt_top) in enumerate(tops)
    ]
    with LLM(folder, dtype="float32", threads=1, **SETTINGS[name]) as llm:
        outputs = llm.generate(prompts, params)
        assert (llm.engine.scheduler.preemptions > 0) == name.startswith("preempted")
    with LLM(folder, dtype="float32", threads=1) as roomy:
        rows = roomy.logits([o.prompt_token_ids + o.token_ids for o in outputs])
    for output, logits, (output_top, prompt_top) in zip(outputs, rows, tops, strict=True):
        want = logits.double().log_softmax(dim=1)
        size = len(output.prompt_token_ids)
        assert len(output.token_ids) == 20
        assert (output.logprobs is None) == (output_top is None)
        assert (output.prompt_logprobs is None) == (prompt_top is None)
        if output.logprobs is not None and output_top is not None:
            for i, (entry, token) in enumerate(zip(output.logprobs, output.token_ids, strict=True)):
                check(entry, token, output_top, want[size - 1 + i], 1e-4)
        if output.prompt_logprobs is not None and prompt_top is not None:
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == size
            for i, reported in enumerate(output.prompt_logprobs[1:], start=1):
                assert reported is not None
                check(reported, output.prompt_token_ids[i], prompt_top, want[i - 1], 1e-4)


def test_a_prompt_preempted_halfway_is_reported_once(small_model: Callable[..., Path]) -> None:
    """Recomputing reports only what had not been reached before."""
    folder = str(small_model("dense"))
    prompt = torch.randint(61, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=36, ignore_eos=True)
    with LLM(folder, dtype="float32", threads=1, kv_tokens=40, block_size=2, step_tokens=4, max_running=4) as llm:
        for i in range(3):
            llm.engine.add(f"short-{i}", [i], greedy)
        reporting = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2)
        long = llm.engine.add("long", prompt, reporting)
        entries: list[TokenLogprobs | None] = []
        halfway = 0
        while llm.engine.has_work:
            before = long.computed
            for delta in llm.engine.step():
                entries += (delta.prompt_logprobs or []) if delta.request_id == "long" else []
            halfway += long.computed < before < long.prompt_size
        assert halfway > 0, "nothing was preempted within its prompt"
        want = llm.logits([prompt])[0].double().log_softmax(dim=1)
    assert entries[0] is None
    assert len(entries) == len(prompt)
    for i, entry in enumerate(entries[1:], start=1):
        assert entry is not None
        check(entry, prompt[i], 2, want[i - 1], 1e-4)
