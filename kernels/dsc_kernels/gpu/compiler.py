"""How kernels are made and launched."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

Meta = dict[str, Any]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


CHAINED_FROM = 90  # the architecture, of NVIDIA's

COUNTS = {"batch", "sequences", "most", "slots", "row_tiles"}  # that change from step to step


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit`, with a type that mypy accepts as a decorator; it is not compiled anew for other COUNTS."""
    return triton.jit(function, do_not_specialize=sorted(COUNTS & inspect.signature(function).parameters.keys()))


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them: it reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def compiles_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has instructions for bfloat16: NVIDIA's have from compute capability 8.0 on."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels take tensors of this kind."""
    if device.type != "cuda":
        return dtype in FLOATS and interpreted()
    return dtype in FLOATS and (dtype != torch.bfloat16 or compiles_bfloat16(device))


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


AMD: ContextVar[bool | None] = ContextVar("AMD", default=None)  # asked for, whatever torch is built for


@contextmanager
def tuned_for(amd: bool) -> Iterator[None]:
    """Inside, tile sizes are those for AMD's GPUs, or for NVIDIA's."""
    before = AMD.set(amd)
    try:
        yield
    finally:
        AMD.reset(before)


def on_amd() -> bool:
    """Whether tile sizes are those for AMD's GPUs."""
    asked = AMD.get()
    return bool(torch.version.hip) if asked is None else asked


_dependent_launch = "auto"

CHAINED: Meta = {"chained": True, "launch_pdl": True}
APART: Meta = {"chained": False}


def chain_of(architecture: int | None) -> Meta:
    """What kernels for an architecture of NVIDIA's are told, 90 for sm_90; None: another's."""
    return CHAINED if architecture is not None and architecture >= CHAINED_FROM else APART


@cache
def architecture() -> int | None:
    """Of the GPU of NVIDIA's that is there, if one is."""
    if torch.version.cuda is None or interpreted() or not torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def chain() -> Meta:
    """What every launch of a kernel is told: to begin while the one before it ends, where the GPU can (programmatic
    dependent launch); it then waits in `arithmetic.follow`."""
    return chain_of(architecture()) if _dependent_launch == "auto" else APART


def use_dependent_launch(choice: str) -> None:
    """As `ops.use_dependent_launch` says."""
    global _dependent_launch
    _dependent_launch = choice


def stages(wanted: int) -> int:
    """Pipeline stages: AMD GPUs have 64 KiB of local memory, enough for two."""
    return min(wanted, 2) if on_amd() else wanted


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Raise ValueError unless the tensor has this shape and dtype (by default any floating one that kernels take)."""
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if tuple(tensor.shape) != shape or tensor.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {expected} {list(shape)}")
    if not serves(tensor.dtype if tensor.dtype in FLOATS else torch.float32, tensor.device):
        raise ValueError(f"{name} is on {tensor.device}; these kernels take tensors on a GPU")
