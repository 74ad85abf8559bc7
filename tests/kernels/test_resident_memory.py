"""Memory for weights is handed out once, whoever asks, and may lie in huge pages."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsc_kernels.memory import PAGE, Arena, mapped

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def mapping_of(address: int) -> str:
    """What the kernel says of the mapping in which an address lies."""
    for entry in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        start, end = (int(bound, 16) for bound in entry.partition(" ")[0].split("-"))
        if start <= address < end:
            return entry
    raise LookupError(address)


def test_a_mapping_may_lie_in_huge_pages() -> None:
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("this system has no huge pages for who asks")
    memory = mapped(3 * PAGE)
    assert memory.numel() == 3 * PAGE and memory.data_ptr() % PAGE == 0 and not memory.any()
    eligible = re.search(r"^THPeligible:\s+(\d)", mapping_of(memory.data_ptr()), re.MULTILINE)
    if eligible is None:
        pytest.skip("this kernel does not say which mappings may have huge pages")
    assert eligible[1] == "1"
