"""How contexts lie in KV blocks: a page of so many tokens takes one block for each group of layers.

Groups whose layers see a window only give back the blocks behind it, so that a context takes what can still be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL = (0,)  # one group of layers, which see all there is


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


@dataclass(frozen=True)
class KvLayout:
    """How keys and values lie in blocks."""

    block_size: int  # tokens of a page
    windows: tuple[int, ...] = ALL  # of each group the positions that its layers see, 0: all

    @property
    def groups(self) -> int:
        return len(self.windows)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.block_size)

    def behind(self, group: int, computed: int) -> int:
        """A group's pages that no token sees any more once so many are computed."""
        window = self.windows[group]
        return max(0, computed + 1 - window) // self.block_size if window else 0

    def most_pages(self, group: int, tokens: int, chunk: int) -> int:
        """The most pages of so many tokens that a group holds at once, where steps compute at most `chunk` of them."""
        window, pages = self.windows[group], self.pages(tokens)
        if not window:
            return pages
        # What the first token of a chunk sees, and the chunk, may begin and end within pages.
        return min(pages, (window + chunk + self.block_size - 3) // self.block_size + 1)

    def most_blocks(self, tokens: int, chunk: int) -> int:
        """The same of all groups together."""
        return sum(self.most_pages(group, tokens, chunk) for group in range(self.groups))

    def tokens_within(self, blocks: int, most: int, chunk: int) -> int:
        """The longest context that so many blocks hold, of at most `most` tokens."""
        if self.windows == ALL:
            return min(most, blocks * self.block_size)
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.most_blocks(middle, chunk) <= blocks else (low, middle - 1)
        return low
