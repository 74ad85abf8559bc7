"""The numbers that tokens are drawn with: from seed and position alone, even, and independent of each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from support.sampling_cases import P_VALUE, logits_of, p_value, request

from dsc_serve import SamplingParams
from dsc_serve.engine.sampler import Sampler, uniform

GOLDEN = 0x9E3779B97F4A7C15
pytestmark = pytest.mark.usefixtures("one_thread")


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
