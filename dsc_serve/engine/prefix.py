"""What a waiting request finds of its prompt in the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from dsc_serve.kv_layout import KvLayout


class Prompted(Protocol):
    """What a request says of the beginning that others may have computed; see `request.Request`."""

    @property
    def prompt_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def block_hashes(self) -> Sequence[bytes]: ...
    @property
    def tail(self) -> bytes | None: ...


class Finder(Protocol):
    def find(self, digest: bytes, group: int = 0) -> int | None: ...


@dataclass(frozen=True)
class Prefix:
    """Pages whose blocks a request can share."""

    pages: int  # how many
    gone: tuple[int, ...]  # of each group the pages before that
    rows: tuple[list[int], ...]  # of each group its blocks, from the first it still sees
    tail: tuple[int, ...] = ()  # of each group the block whose beginning can be copied behind them
    tokens: int = 0  # that need not be computed

    @property
    def blocks(self) -> list[int]:
        return self.rows[0] if len(self.rows) == 1 else list(chain.from_iterable(self.rows))

    def most_blocks(self, tokens: int, chunk: int, layout: KvLayout) -> int:
        """The most blocks that so many tokens behind it, and it, hold at once in steps of `chunk` tokens."""
        left = layout.pages(tokens)
        return sum(min(left - gone, layout.most_pages(g, tokens, chunk)) for g, gone in enumerate(self.gone))


def find_prefix(pool: Finder, request: Prompted, layout: KvLayout) -> Prefix:
    """The longest beginning that can be shared; a request's last token is computed in any case."""
    size = layout.block_size
    block_hashes = request.block_hashes[: (request.num_tokens - 1) // size]
    pages = shared_pages(pool, block_hashes, layout)
    gone = tuple(layout.behind(group, pages * size) for group in range(layout.groups))
    rows = tuple(
        [held(pool, block_hashes[i], group) for i in range(gone[group], pages)] for group in range(layout.groups)
    )
    tail: tuple[int, ...] = ()
    if request.tail is not None and pages == request.prompt_size // size:
        found = [pool.find(request.tail, group) for group in range(layout.groups)]
        tail = tuple(block for block in found if block is not None)
        tail = tail if len(tail) == layout.groups else ()
    tokens = min(request.prompt_size, request.num_tokens - 1) if tail else pages * size
    return Prefix(pages, gone, rows, tail, tokens)


def shared_pages(pool: Finder, block_hashes: Sequence[bytes], layout: KvLayout) -> int:
    """The most pages at whose end every group finds what its layers see from there."""
    whole = [group for group in range(layout.groups) if not layout.windows[group]]
    pages = len(block_hashes)
    if whole:
        pages = next(
            (i for i, block_hash in enumerate(block_hashes) if any(pool.find(block_hash, g) is None for g in whole)),
            pages,
        )
    windowed = [group for group in range(layout.groups) if layout.windows[group]]
    at = 0  # groups in a row that have all they need
    while windowed and pages and at < len(windowed):
        group = windowed[at]
        seen = range(pages - 1, layout.behind(group, pages * layout.block_size) - 1, -1)
        missing = next((i for i in seen if pool.find(block_hashes[i], group) is None), None)
        # Every end behind a missing page, up to this one, would need it too.
        pages, at = (pages, at + 1) if missing is None else (missing, 0)
    return pages


def held(pool: Finder, block_hash: bytes, group: int) -> int:
    block = pool.find(block_hash, group)
    assert block is not None, "a page that was found is gone"
    return block
