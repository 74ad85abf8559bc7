"""From the hidden states of a prompt, as steps compute them, to its one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_serve.pooling import Pooling
from dsc_serve.sampling_params import EmbeddingParams


@dataclass(frozen=True)
class Method:
    """How the vectors of a text's positions become one."""

    every_position: bool  # whether all of a prompt's positions must be computed for it, so that none comes from a cache
    first: Callable[[int], int]  # the first position that counts, of so many in all
    weight: Callable[[int], float]  # of each position that counts, of so many in all


METHODS = {
    "last": Method(every_position=False, first=lambda size: size - 1, weight=lambda size: 1.0),
    "mean": Method(every_position=True, first=lambda size: 0, weight=lambda size: 1 / size),
}


class Pooler:
    """One request's way from final hidden states, after the final norm, to its vector."""

    def __init__(self, pooling: Pooling, params: EmbeddingParams, prompt_size: int) -> None:
        self._method, self._normalise, self._dimensions = METHODS[pooling.method], pooling.normalise, params.dimensions
        self._size = prompt_size

    @property
    def every_position(self) -> bool:
        return self._method.every_position

    def skipped(self, start: int, end: int) -> int:
        """Of the positions from `start` to `end`, how many from the first on count for nothing."""
        return min(max(self._method.first(self._size) - start, 0), end - start)

    def part(self, rows: Tensor) -> Tensor:
        """What positions [T, d] add to the vector, float64 [d]."""
        return rows.double().sum(0) * self._method.weight(self._size)

    def vector(self, parts: Sequence[Tensor]) -> bytes:
        """The whole vector, float32 in little-endian order, cut to the dimensions asked for and then normalised."""
        vector = torch.stack(list(parts)).sum(0)[: self._dimensions]
        if self._normalise or self._dimensions is not None:
            vector = vector / vector.norm().clamp_min(1e-12)
        return vector.float().cpu().numpy().astype("<f4").tobytes()
