"""Sampling by operations that never wait for a device draws the same tokens as sampling on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsc_serve.engine.request import Request
from dsc_serve.engine.sampler import draw, draw_on_device, keep, keep_sorted
from dsc_serve.sampling_params import SamplingParams

CHANGES: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 400},
    {"top_p": 0.05},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.3},
    {"top_k": 500, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
]


def request(seed: int, fields: dict[str, Any]) -> Request:
    return Request(str(seed), 3, [1, 2, 3], SamplingParams(seed=seed, **fields), 8)


@pytest.mark.parametrize("size", [1, 30, 700])
def test_mixed_rows_draw_what_the_host_draws(size: int) -> None:
    requests = [request(i, fields) for i, fields in enumerate(CHANGES * 8)]
    logits = torch.randn(len(requests), size, generator=torch.Generator().manual_seed(size)) * 2
    tokens = draw_on_device(logits.clone(), requests)
    greedy = torch.tensor([r.params.greedy for r in requests])
    assert torch.equal(tokens[greedy], logits[greedy].argmax(dim=1))
    drawn = draw(logits[~greedy].clone(), [r for r in requests if not r.params.greedy])
    assert torch.equal(tokens[~greedy], drawn)


@pytest.mark.parametrize("fields", CHANGES, ids=str)
def test_company_changes_nothing(fields: dict[str, Any]) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    requests = [request(7, fields), request(8, {"top_p": 0.4}), request(9, {"temperature": 0})]
    assert draw_on_device(logits.clone(), requests)[0] == draw_on_device(logits[:1].clone(), requests[:1])[0]


def test_rows_without_a_number_harm_no_other() -> None:
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    requests = [request(i, {"top_p": 0.8}) for i in range(4)]
    clean = draw_on_device(logits.clone(), requests)
    logits[1], logits[2] = torch.nan, -torch.inf
    tokens = draw_on_device(logits.clone(), requests)
    assert torch.equal(tokens[[0, 3]], clean[[0, 3]])
    assert bool(((tokens >= 0) & (tokens < 40)).all())


def test_the_kept_set_is_the_same_however_it_is_found() -> None:
    g = torch.Generator().manual_seed(3)
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0])[torch.randint(4, (300, 90), generator=g)]
    weights[:, 5] = 1.0
    columns = (
        torch.randint(1, 91, (300, 1), generator=g),
        torch.randint(1, 9, (300, 1), generator=g).double() / 8,
        torch.randint(0, 5, (300, 1), generator=g).float() / 8,
    )
    assert torch.equal(keep_sorted(weights, *columns), keep(weights, *columns))
