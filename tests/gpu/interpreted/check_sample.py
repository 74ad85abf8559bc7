"""Sampling without sorting draws from the kept sets that sorting finds, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from support.honest import banded
from torch import Tensor

from dsc_kernels.gpu import sample as module
from dsc_kernels.gpu.sample import sample
from dsc_serve.engine.sampler import invert, keep_sorted, relative_weights

CHANGES = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 0, 0.05, 0.0),
    (2.0, 0, 0.95, 0.0),
    (1.0, 0, 1.0, 0.3),
    (0.7, 25, 0.9, 0.01),
    (5.0, 28, 0.999999, 0.0),
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of small vocabularies."""
    monkeypatch.setattr(module, "WIDTH", 64)


def parameters_of(rows: list[tuple[float, int, float, float]], vocabulary: int, seed: int) -> Tensor:
    u = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fields = [(t, min(k, vocabulary) or vocabulary, p, m, float(x)) for (t, k, p, m), x in zip(rows, u, strict=True)]
    return torch.tensor(fields, dtype=torch.float64)


def sorted_draws(weights: Tensor, parameters: Tensor) -> Tensor:
    _, top_k, top_p, min_p, u = parameters[:, :, None].unbind(1)
    return invert(keep_sorted(weights, top_k, top_p, min_p.float()), u)


def drawn(weights: Tensor, parameters: Tensor) -> Tensor:
    tokens = banded(torch.full((len(weights),), -7))
    return sample(banded(weights), banded(parameters), tokens)


@pytest.mark.parametrize("vocabulary", [1, 64, 150])
def test_mixed_rows_draw_what_sorting_draws(vocabulary: int) -> None:
    rows = CHANGES
    parameters = parameters_of(rows, vocabulary, vocabulary)
    logits = 2 * torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    greedy = parameters[:, 0] == 0
    weights = relative_weights(logits, torch.where(greedy, 1.0, parameters[:, 0])[:, None].float())
    tokens = drawn(weights, parameters)
    assert torch.equal(tokens[~greedy], sorted_draws(weights, parameters)[~greedy])
    assert (tokens[greedy] == -7).all()


def test_equals_are_kept_in_the_order_of_the_vocabulary() -> None:
    """Of weights whose sums are exact, so that every kept set is the same one; each is drawn from everywhere."""
    g = torch.Generator().manual_seed(3)
    count, vocabulary = 20, 70
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0])[torch.randint(4, (count, vocabulary), generator=g)]
    weights[:, 5] = 1.0
    columns = (
        torch.ones(count),
        torch.randint(1, vocabulary + 1, (count,), generator=g),
        torch.randint(1, 9, (count,), generator=g) / 8,
        torch.randint(0, 5, (count,), generator=g) / 8,
        (torch.arange(count) % 8) / 8,
    )
    parameters = torch.stack([column.double() for column in columns], dim=1)
    assert torch.equal(drawn(weights, parameters), sorted_draws(weights, parameters))


def test_the_ends_of_the_range_draw_the_first_and_the_last_that_are_kept() -> None:
    weights = torch.zeros(2, 150)
    weights[:, [3, 70, 140]] = torch.tensor([0.25, 1.0, 0.5])
    parameters = torch.tensor([[1.0, 150, 1.0, 0.0, 0.0], [1.0, 150, 1.0, 0.0, 1 - 2**-53]], dtype=torch.float64)
    assert drawn(weights, parameters).tolist() == [3, 140]


def test_rows_without_a_number_harm_no_other() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    parameters = parameters_of([(1.0, 0, 0.8, 0.0)] * 3, 40, 1)
    ones = torch.ones(3, 1)
    clean = drawn(relative_weights(logits, ones), parameters)
    logits[1] = torch.nan
    tokens = drawn(relative_weights(logits, ones), parameters)
    assert torch.equal(tokens[[0, 2]], clean[[0, 2]]) and 0 <= int(tokens[1]) < 40


def test_what_does_not_fit_is_refused_by_name() -> None:
    weights, parameters, tokens = torch.ones(2, 9), torch.ones(2, 5, dtype=torch.float64), torch.zeros(2).long()
    with pytest.raises(ValueError, match="parameters"):
        sample(weights, parameters[:, :4], tokens)
    with pytest.raises(ValueError, match="tokens"):
        sample(weights, parameters, tokens.int())
