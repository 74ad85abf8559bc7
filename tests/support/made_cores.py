"""Random bases, and adapters whose cores stand on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dsc_kernels.weights import Core, LowRank, Pair, Place, Update
from dsc_serve.model.adapter import Adapter
from support.made_adapters import adapter_of


@dataclass(frozen=True)
class Cored:
    """An adapter on a basis, as kernels take it and with every update spelt out."""

    updates: Mapping[Place, Update]
    spelt: Adapter


def random_pairs(shapes: Mapping[Place, tuple[int, int]], inner: int, rank: int, seed: int) -> dict[Place, Pair]:
    """A pair of every module."""
    g = torch.Generator().manual_seed(seed)
    return {
        place: Pair(torch.randn(inner, into, generator=g) / into**0.5, torch.randn(out, rank, generator=g) / rank**0.5)
        for place, (out, into) in shapes.items()
    }


def random_cores(name: str, pairs: Mapping[Place, Pair], seed: int, own: int = 0, left_out: int = 0) -> Cored:
    """A core of every module, with scales that differ.

    own: every so many modules have a LoRA of their own instead; left_out: every so many have nothing.
    """
    g = torch.Generator().manual_seed(seed)
    updates, spelt = dict[Place, Update](), dict[Place, LowRank]()
    for i, (place, (down, up)) in enumerate(pairs.items()):
        scale = 0.5 + 0.25 * (i % 3)
        if left_out and i % left_out == 1:
            continue
        if own and i % own == own - 1:
            shape = (5, down.shape[1]), (up.shape[0], 5)
            spelt[place] = LowRank(*(torch.randn(*size, generator=g) / size[1] ** 0.5 for size in shape), scale)
            updates[place] = spelt[place]
            continue
        matrix = torch.randn(up.shape[1], down.shape[0], generator=g) / down.shape[0] ** 0.5
        updates[place], spelt[place] = Core(matrix, scale), LowRank(down, up, scale, core=matrix)
    return Cored(updates, adapter_of(name, spelt))
