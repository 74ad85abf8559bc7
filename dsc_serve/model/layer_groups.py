"""Which layers keep their keys and values in the same KV blocks.

A block holds so many tokens of some layers, the same number of layers whichever group it is of: all groups take blocks
from one pool, and a group whose layers see a window only gives back those behind it. What a context takes is then what
its layers can still see, in any mixture of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc_kernels.weights import SCALE_BYTES
from dsc_serve.model.config import ModelConfig

WASTE = 0.15  # of the layers' number: places for layers that no layer takes, where groups are larger for it


@dataclass(frozen=True)
class LayerGroups:
    """Which layers keep their blocks together."""

    windows: tuple[int, ...]  # of each group the positions that its layers see, 0: all
    group: tuple[int, ...]  # of each layer
    place: tuple[int, ...]  # of each layer in its group's blocks
    size: int  # places of a block


def group_layers(windows: Sequence[int], context: int) -> LayerGroups:
    """Groups of layers with these windows, for contexts of at most so many tokens: those that see all come first."""
    seen = [window if 0 < window < context else 0 for window in windows]
    alike = {window: [i for i, own in enumerate(seen) if own == window] for window in sorted(set(seen))}
    size = group_size([len(layers) for layers in alike.values()])
    starts: list[int] = []
    group, place = [0] * len(seen), [0] * len(seen)
    for window, layers in alike.items():
        for at, layer in enumerate(layers):
            if at % size == 0:
                starts.append(window)
            group[layer], place[layer] = len(starts) - 1, at % size
    return LayerGroups(tuple(starts), tuple(group), tuple(place), size)


def group_size(counts: Sequence[int]) -> int:
    """The most layers to a group, so that few places stay empty where layers of each window are so many."""
    layers = sum(counts)

    def places(size: int) -> int:
        return sum(-(-count // size) * size for count in counts)

    return next(size for size in range(min(counts), 0, -1) if places(size) <= layers * (1 + WASTE))


def layer_groups(config: ModelConfig) -> LayerGroups:
    """Those of a model."""
    return group_layers([layer.window for layer in config.layers], config.max_position_embeddings)


def token_bytes(config: ModelConfig, element: int, int8: bool = False) -> int:
    """What a token takes in a block of one group, in numbers of `element` bytes or in int8."""
    row = config.head_dim + SCALE_BYTES if int8 else config.head_dim * element
    return layer_groups(config).size * config.cached_rows * row
