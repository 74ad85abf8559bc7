"""What launches should take on a GPU, by arithmetic from stated rates, and which of two ways is the shorter one by it.

Nothing here is measured: the rates are those of `dsc-serve kernels steps`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

BFLOAT16 = 2
BANDWIDTH, FLOPS, LAUNCH = 4e12, 7e14, 2.25e-6  # bytes and products a second; seconds of each launch
CACHE_BANDWIDTH = 5.5e12  # of the second-level cache
PROGRAM_BANDWIDTH = 80e9  # of one program: about 56 KB on their way, which take 0.7 us


@dataclass(frozen=True)
class Launch:
    """What a kernel reads and multiplies in one launch."""

    name: str
    read: float = 0  # weights and rows that are read, in numbers
    products: float = 0  # multiplications of the whole step
    cached: float = 0  # where programs read the same again, from the cache: all that they read together
    of_a_program: float = 0  # and what one of few must read

    def seconds(self, bandwidth: float = BANDWIDTH, flops: float = FLOPS) -> float:
        """The longest of what it does, without its launch."""
        reading = max(self.read / bandwidth, self.cached / CACHE_BANDWIDTH, self.of_a_program / PROGRAM_BANDWIDTH)
        return max(reading * BFLOAT16, 2 * self.products / flops)


def seconds(launches: Iterable[Launch]) -> float:
    """What these take one after the other."""
    return sum(LAUNCH + one.seconds() for one in launches)


def beside_the_norm(experts: int, d: int, tokens: int) -> list[Launch]:
    """Logits of many experts where the norm is computed, which each token's programs do by themselves."""
    rows = tokens * experts * d
    blocks = 8 if tokens * -(-experts // 8) <= 264 else 16
    normed = 3 * tokens * -(-experts // blocks) * d  # a residual, and a term in float32
    return [Launch("add, norm and score", experts * d, rows, rows + normed), Launch("pick")]


def in_a_product(experts: int, d: int, tokens: int) -> list[Launch]:
    """The same by a product of its own, of which few programs have all rows."""
    rows, columns = (16, 16) if tokens <= 16 else (64, min(max(tokens, 32), 64))
    norm = Launch("add and norm", cached=3 * tokens * d)
    return [norm, Launch("score", experts * d, tokens * experts * d, of_a_program=(rows + columns) * d), Launch("pick")]


@cache
def scored_beside(experts: int, d: int, tokens: int) -> bool:
    """Whether the first takes no longer than the second."""
    return seconds(beside_the_norm(experts, d, tokens)) <= seconds(in_a_product(experts, d, tokens))


def finding_rows(experts: int, tokens: int, k: int, columns: int) -> Launch:
    """What tiles read where each counts the picks of all tokens, int32, by itself; columns: tiles of a row, of both
    products together."""
    tiles = tokens * k // 16 + min(experts, tokens * k)
    return Launch("find rows", cached=2 * tokens * k * tiles * columns)


@cache
def found_by_tiles(experts: int, tokens: int, k: int, columns: int) -> bool:
    """Whether that takes no longer than the launch of a sort."""
    return finding_rows(experts, tokens, k, columns).seconds() <= LAUNCH
