"""An order of tokens in which neighbours share atoms, and how much tiles of such neighbours share.

Composition reads a row of each bank per pick; where neighbours pick the same atoms, a row is read again from a cache
nearer than the one it came from. Nothing but the order of the tokens changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_kernels import min_hash, native
from dsc_kernels.min_hash import MASK, checked

TILE = 16


@dataclass(frozen=True)
class Tiles:
    """The different atoms of each tile of tokens."""

    atoms: Tensor  # int32 [n], ascending within a tile, one tile after the other
    offsets: Tensor  # int64 [tiles + 1]: where each begins
    picks: int  # how many picks the tiles hold together, tokens · K

    @property
    def sharing(self) -> float:
        """ρ: different atoms, summed over the tiles, per pick. 1 where nothing is shared, or nothing picked."""
        return self.atoms.numel() / self.picks if self.picks else 1.0


def min_hash_order(picks: Tensor) -> Tensor:
    """The order int32 [B] of tokens with atoms `picks` (integers [B, K]): by min-hash, so that neighbours share atoms.

    Tokens are compared by the smallest hash of their atoms, then the second smallest, then their index; two tokens
    agree in the smallest with the probability |A ∩ B| / |A ∪ B|. Raises ValueError beyond 2^20 tokens.
    """
    picks = checked(picks)
    if native.serves(torch.float32, picks.device):
        return native.min_hash_order(picks)
    return min_hash.min_hash_order(picks)


def tiles(picks: Tensor, order: Tensor | None = None, tile: int = TILE) -> Tiles:
    """The different atoms of every `tile` tokens of `picks` (integers [B, K]), in `order` (int32 [B]) or as given."""
    if tile < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1 token")
    picks = checked(picks)
    if order is not None and order.shape != picks.shape[:1]:
        raise ValueError(f"order is {list(order.shape)}; expected one entry for each of {len(picks)} tokens")
    if native.serves(torch.float32, picks.device):
        return Tiles(*native.tile_unions(picks, order, tile), picks.numel())
    ordered = picks if order is None else picks[order.long()]
    count = -(-len(picks) // tile)
    rows = torch.arange(len(picks), device=picks.device) // tile
    unique = torch.unique((rows << 32)[:, None] | ordered)  # by tile, then atom
    ends = torch.bincount(unique >> 32, minlength=count).cumsum(0)
    return Tiles((unique & MASK).int(), torch.cat((ends.new_zeros(1), ends)), picks.numel())
