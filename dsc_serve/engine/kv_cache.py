"""Bookkeeping of the KV pool's blocks: who owns which."""

from __future__ import annotations

from collections.abc import Iterable


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Hands out blocks 0 … total − 1. Every block is free or owned by exactly one request."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Raises MemoryError when fewer are free; ask `can_allocate` first."""
        if not self.can_allocate(count):
            raise MemoryError(f"{count} KV blocks wanted, {len(self._free)} are free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def release(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))

    def fault(self, owned: Iterable[list[int]]) -> str | None:
        """What is wrong with the ownership, given every owner's blocks; None when free + owned is all blocks."""
        seen = sorted([*self._free, *(b for blocks in owned for b in blocks)])
        if seen == list(range(self.total)):
            return None
        return f"{self.total} KV blocks, but {len(self._free)} free and {len(seen) - len(self._free)} owned"
