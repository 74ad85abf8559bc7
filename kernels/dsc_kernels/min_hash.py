"""Hashes of atoms, and the order of tokens that they give; in plain torch. See `grouping`."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INDEX_BITS = 20
MASK = 0xFFFFFFFF

Integers = TypeVar("Integers", Tensor, NDArray[np.int64])


def scramble(values: Integers) -> Integers:
    """A hash in [0, 2^32) of every int64 value, by its low 32 bits."""
    x = values & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def checked(picks: Tensor) -> Tensor:
    """Raise ValueError unless these are integers [tokens, K] of at most 2^20 tokens."""
    if picks.dim() != 2 or picks.shape[1] < 1 or picks.is_floating_point():
        raise ValueError(f"picks are {picks.dtype} {list(picks.shape)}; expected integers [tokens, K], K at least 1")
    if len(picks) > 1 << INDEX_BITS:
        raise ValueError(f"{len(picks)} tokens cannot be ordered at once; at most {1 << INDEX_BITS} can")
    return picks


def min_hash_order(picks: Tensor) -> Tensor:
    """`grouping.min_hash_order` on any device, without waiting for it."""
    hashes = scramble(checked(picks).long())
    least = hashes.topk(min(2, picks.shape[1]), dim=1, largest=False, sorted=True).values
    second = least[:, 1] if least.shape[1] > 1 else torch.full_like(least[:, 0], MASK)
    index = torch.arange(len(picks), device=picks.device)
    keys = (least[:, 0] >> 9 << 40) | (second >> 12 << INDEX_BITS) | index
    return (keys.sort().values & ((1 << INDEX_BITS) - 1)).int()
