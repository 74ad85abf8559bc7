"""Memory for weights is handed out once, whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from dsc_kernels.memory import Arena


class Watched:
    """Stands in for what is left of a mapping: while its size is looked at, something else happens."""

    def __init__(self, left: Tensor, meanwhile: Callable[[], None]) -> None:
        self.left, self.meanwhile = left, [meanwhile]

    def numel(self) -> int:
        if self.meanwhile:
            self.meanwhile.pop()()
        return self.left.numel()

    def __getitem__(self, part: slice) -> Tensor:
        return self.left[part]


def test_memory_is_handed_out_once_also_to_two_threads() -> None:
    arena, size, others = Arena(), 640, list[Tensor]()
    other = threading.Thread(target=lambda: others.append(arena.take(size)))

    def take_too() -> None:
        other.start()
        other.join(0.2)

    arena._left = Watched(torch.zeros(1000, dtype=torch.uint8), take_too)
    own = arena.take(size)
    other.join(60)
    assert own.numel() == others[0].numel() == size
    assert abs(own.data_ptr() - others[0].data_ptr()) >= size
