"""What ranks that share a model exchange; a model that is not shared is computed by a rank that is alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class GroupLostError(RuntimeError):
    """The ranks that share a model cannot go on together: one has ended, or they no longer compute the same step."""


@dataclass(frozen=True)
class Shard:
    """One of `size` ranks that share a model."""

    rank: int = 0
    size: int = 1

    def part(self, count: int) -> range:
        """Its own of so many heads, rows or columns; where they are not a multiple of the ranks, some have one more."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


class RankExchange(Protocol):
    """Every rank calls the same methods in the same order with tensors of the same shapes."""

    @property
    def shard(self) -> Shard: ...

    def sum(self, own: Tensor) -> Tensor:
        """The sum of what all ranks have, the same bits everywhere; own may be overwritten."""

    def gather(self, own: Tensor) -> Tensor:
        """What each rank has, in their order: [...] → [ranks, ...]."""


class Alone:
    """One rank that has all there is."""

    shard = Shard()

    def sum(self, own: Tensor) -> Tensor:
        return own

    def gather(self, own: Tensor) -> Tensor:
        return own[None]


ALONE = Alone()
