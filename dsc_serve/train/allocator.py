"""The C library's allocator, told to keep what it has."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> None:
    """Never return freed memory to the system, where the C library is glibc.

    By default every large tensor is fetched page by page from the kernel and given back at its end, which costs more
    than computing it.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # none: what a step of gigabytes leaves free would be fetched again in the next
        mallopt(M_TOP_PAD, 64 << 20)
