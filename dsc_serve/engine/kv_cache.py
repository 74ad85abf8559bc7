"""Bookkeeping of the KV pool's blocks: who owns which, and which hold a prefix that may be wanted again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

HASH_BYTES = 16


def hash_seed(secret: bytes, salt: str, adapter: str = "") -> bytes:
    """Where the chain of block hashes of all prompts with this salt begins. Nobody without the secret can compute one.

    adapter: the digest of what they are computed with. The fields' lengths keep one from being taken for the other.
    """
    fields = [salt.encode(), adapter.encode()]
    content = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    return hashlib.blake2b(content, digest_size=HASH_BYTES, key=secret).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block: of its tokens and, by the hash of the block before it, of all tokens before them."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=HASH_BYTES).digest()


def group_hash(digest: bytes, group: int) -> bytes:
    """The hash of what a group of layers holds of a page; no two are as long as a page's and the same."""
    return digest if group == 0 else digest + group.to_bytes(2)


class BlockPool:
    """Hands out blocks 0 … total − 1. Every block is free, cached or owned, by one request or by several.

    A block whose content has been published is cached, not free, once nobody owns it any more: it is found by its hash
    until it is the one that was released the longest ago and no free block is left. groups: how many groups of layers
    have blocks of their own; what one of them holds of a page is found by the page's hash and the group.
    """

    def __init__(self, total: int, groups: int = 1) -> None:
        self.total, self.groups = total, groups
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._owners = array("i", [0]) * total
        self._hashes: list[bytes | None] = [None] * total
        self._published: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that can be allocated: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    def owners(self, block: int) -> int:
        return self._owners[block]

    def can_allocate(self, count: int) -> bool:
        return count <= self.available

    def allocate(self, count: int) -> list[int]:
        """Raises MemoryError when fewer are available; ask `can_allocate` first."""
        if not self.can_allocate(count):
            raise MemoryError(f"{count} KV blocks wanted, {self.available} are available")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        while len(taken) < count:
            taken.append(self._evict())
        for block in taken:
            self._owners[block] = 1
        return taken

    def find(self, digest: bytes, group: int = 0) -> int | None:
        """The block that holds a group's part of what has this hash."""
        return self._published.get(group_hash(digest, group))

    def match(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The first group's blocks that hold the longest published prefix of a chain of hashes."""
        blocks = []
        for digest in block_hashes:
            block = self._published.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Make a request one more owner of blocks found by `match`."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._cached[block]
            self._owners[block] += 1

    def publish(self, block: int, digest: bytes, group: int = 0) -> None:
        """Let an owned block, full and computed, be found. Where another has the same content, that one stays."""
        digest = group_hash(digest, group)
        if self._hashes[block] is None and digest not in self._published:
            self._hashes[block] = digest
            self._published[digest] = block

    def withdraw(self, digest: bytes) -> None:
        """Let no group's block be found by this hash any more."""
        for group in range(self.groups):
            block = self._published.pop(group_hash(digest, group), None)
            if block is not None:
                self._hashes[block] = None
                if self._owners[block] == 0:
                    del self._cached[block]
                    self._free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block; of a prefix, the end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def fault(self, owned: Iterable[Sequence[int]]) -> str | None:
        """What is wrong with the ownership, given every owner's blocks; None when free, cached and owned add up.

        Costs microseconds when there are no owners, however large the pool.
        """
        wanted = np.bincount(np.fromiter(chain.from_iterable(owned), dtype=np.int64), minlength=self.total)
        owners = np.frombuffer(self._owners, dtype=np.intc)
        count = int(np.count_nonzero(owners))
        if np.array_equal(owners, wanted) and self.free + self.cached + count == self.total:
            return None
        return f"{self.total} KV blocks, but {self.free} free, {self.cached} cached and {count} owned"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._hashes[block]
        assert digest is not None
        del self._published[digest]
        self._hashes[block] = None
        return block
