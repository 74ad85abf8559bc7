"""What the sampler's tests share: requests, chi-square tests, rows of logits.

About 120 chi-square tests with fixed seeds: each asks for p > 1e-5, so a sampler that is right passes all of them for
all but one in 800 choices of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsc_serve import SamplingParams
from dsc_serve.engine.request import Request

P_VALUE = 1e-5


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
