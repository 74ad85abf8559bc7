"""Where a request should go: to a replica that has computed the beginning of its prompt, unless that one is too busy.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018), and a memory of who computed which prefix.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

LINK_BYTES = 128  # bytes of a prompt in one link of its chain, about two KV blocks
MAX_LINKS = 96
POINTS = 64  # of each replica on the ring
REMEMBERED = 65_536  # prefixes
HOLDERS = 4  # replicas remembered for one prefix
ASKED = 4  # replicas on the way from a request's place, should the first have no room


@dataclass(frozen=True)
class PlacementKey:
    """What a request has in common with others."""

    tenant: str = ""  # whose it is; "": nobody's
    chain: tuple[int, ...] = ()  # the links of its prompt's

    @property
    def key(self) -> int | None:
        """The place on the ring: a tenant's prompts that begin alike share it. None: nothing to hold on to."""
        if not (self.tenant or self.chain):
            return None
        return position(f"{self.tenant}:{self.chain[0] if self.chain else ''}".encode())


@dataclass(frozen=True)
class Bound:
    """How busy a replica may be and still be preferred: `slack` requests always, then `factor` times the mean."""

    factor: float = 1.25
    slack: int = 8

    def most(self, loads: Collection[int]) -> int:
        """Requests below which a replica may take another one."""
        return max(self.slack, math.ceil(self.factor * (sum(loads) + 1) / len(loads)))


def position(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def chain_of(prompt: bytes, salt: bytes = b"") -> tuple[int, ...]:
    """One number for each whole block of a prompt's beginning, which depends on all bytes up to the block's end.

    salt: prompts of different salts share nothing.
    """
    running, links = blake2b(salt, digest_size=8), []
    for start in range(0, min(len(prompt) // LINK_BYTES, MAX_LINKS) * LINK_BYTES, LINK_BYTES):
        running.update(prompt[start : start + LINK_BYTES])
        links.append(int.from_bytes(running.digest(), "big"))
    return tuple(links)


class Ring:
    """Replicas by name on a circle of 64-bit numbers: who leaves or joins moves only its own share of the keys."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        points = sorted((position(f"{name}#{i}".encode()), name) for name in self.names for i in range(POINTS))
        self._points = [point for point, _ in points]
        self._owners = [name for _, name in points]

    def walk(self, key: int) -> Iterator[str]:
        """Every replica once, clockwise from the key."""
        seen: set[str] = set()
        start = bisect.bisect(self._points, key)
        for i in range(len(self._owners)):
            owner = self._owners[(start + i) % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner
            if len(seen) == len(self.names):
                return


class PrefixMemory:
    """Which replicas were last given a prompt with which beginning. Bounded; the oldest is forgotten first."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self._size = size
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def holders(self, chain: Sequence[int], alive: Collection[str]) -> tuple[str, ...]:
        """The replicas that hold the longest known part of the chain, the latest first."""
        for link in reversed(chain):
            if found := tuple(name for name in self._holders.get(link, ()) if name in alive):
                return found
        return ()

    def record(self, chain: Sequence[int], name: str) -> None:
        for link in chain:
            others = tuple(other for other in self._holders.get(link, ()) if other != name)
            self._holders[link] = (name, *others)[:HOLDERS]
            self._holders.move_to_end(link)
        while len(self._holders) > self._size:
            self._holders.popitem(last=False)


def order(
    placement: PlacementKey, ring: Ring, holders: Collection[str], loads: Mapping[str, int], bound: Bound
) -> list[str]:
    """The replicas to ask, one after the other: holders within the bound, the ring's first within it, the least busy.

    loads: requests in flight by replica; the ring has the same names.
    """
    key = placement.key
    if key is None:
        return heapq.nsmallest(ASKED, loads, key=loads.__getitem__)
    most = bound.most(loads.values())
    held = sorted((n for n in holders if loads[n] < most), key=lambda name: position(f"{key}:{name}".encode()))
    free = itertools.islice((name for name in ring.walk(key) if loads[name] < most), ASKED)
    return list(dict.fromkeys([*held, *free, min(loads, key=loads.__getitem__)]))
