"""Memory for weights that every step reads: in huge pages where the system has them.

Rows picked from a bank lie all over it, and with pages of 4 KiB nearly every one costs a walk through the page tables.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
CHUNK = 16 << 20  # allocations up to this share mappings
ALIGNMENT = 64


class Arena:
    """Hands out parts of mappings; a mapping lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """So many bytes, zero, aligned to a cache line."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if size > CHUNK:
            return mapped(size)
        with self._lock:
            if size > self._left.numel():
                self._left = mapped(CHUNK)
            taken, self._left = self._left[:size], self._left[size:]
        return taken


def mapped(size: int) -> Tensor:
    """A new anonymous mapping of at least so many bytes, beginning at a huge page."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has a setting of its own, never by default
    mapping = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: pages of the usual size then
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + size]


_arena = Arena()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Zeros, on the CPU in such memory."""
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return _arena.take(size)[:size].view(dtype).view(shape)


def resident(tensor: Tensor) -> Tensor:
    """The same, contiguous, on the CPU in such memory; on another device the tensor itself."""
    return zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor) if tensor.device.type == "cpu" else tensor


def trim() -> None:
    """Give back to the system what tensors that are gone have left in the heap."""
    with contextlib.suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
