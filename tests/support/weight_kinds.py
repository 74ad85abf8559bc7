"""Weights and inputs that make screening in int8 hard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

WEIGHTS: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "normal": lambda g, rows, d: torch.randn(rows, d, generator=g),
    "heavy": lambda g, rows, d: torch.randn(rows, d, generator=g) ** 5,
    "uneven rows": lambda g, rows, d: torch.randn(rows, d, generator=g) * 10 ** torch.randn(rows, 1, generator=g),
    "uneven columns": lambda g, rows, d: torch.randn(rows, d, generator=g) * 10 ** torch.randn(1, d, generator=g),
    "few values": lambda g, rows, d: torch.randint(-1, 2, (rows, d), generator=g).float(),
    "equal rows": lambda g, rows, d: torch.randn(1, d, generator=g).expand(rows, d).clone(),
    "zero": lambda g, rows, d: torch.zeros(rows, d),
    "tiny": lambda g, rows, d: torch.randn(rows, d, generator=g) * 1e-35,
    "large": lambda g, rows, d: torch.randn(rows, d, generator=g) * 1e25,
    "huge": lambda g, rows, d: torch.randn(rows, d, generator=g) * 1e32,
}


def outliers(g: Generator, batch: int, d: int) -> Tensor:
    """A few inputs of each token are up to 300 times larger than the others; they may lie side by side."""
    x = torch.randn(batch, d, generator=g)
    count = int(torch.randint(1, 1 + max(1, d // 5), (), generator=g))
    x[:, torch.randperm(d, generator=g)[:count]] *= 300 * torch.rand(count, generator=g)
    return x


INPUTS: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "normal": lambda g, batch, d: torch.randn(batch, d, generator=g),
    "outliers": outliers,
    "one": lambda g, batch, d: torch.nn.functional.one_hot(torch.randint(0, d, (batch,), generator=g), d) * -3.0,
    "zero": lambda g, batch, d: torch.zeros(batch, d),
    "tiny": lambda g, batch, d: torch.randn(batch, d, generator=g) * 1e-30,
    "large": lambda g, batch, d: torch.randn(batch, d, generator=g) * 1e13,
    "huge": lambda g, batch, d: torch.randn(batch, d, generator=g) * 1e25,
}
