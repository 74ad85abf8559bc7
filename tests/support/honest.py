"""What makes tests under Triton's interpreter mean something: honest bfloat16, poisoned outputs, guard bands.

Importing this sets TRITON_INTERPRET, so it comes before any kernel. Left alone, the interpreter computes with the bits
of bfloat16 as if they were integers, truncates when it rounds to it, and lets a store run into the next tensor.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

BAND = 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MOST_DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def install_bfloat16() -> None:
    """Arithmetic on bfloat16 raises, except in products, which read its values; rounding to it is to nearest even."""
    builder, wide_dot, convert = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot, None
    convert = interpreter._convert_float

    def refuse(name: str) -> None:
        operation = getattr(builder, name)

        def guarded(self: Any, *operands: Any) -> Any:
            if any(isinstance(o, interpreter.TensorHandle) and is_bfloat16(o) for o in operands):
                raise TypeError("bfloat16 arithmetic: convert to float32 first")
            return operation(self, *operands)

        setattr(builder, name, guarded)

    def reduce(self: Any, operands: Any) -> Any:
        if any(is_bfloat16(o.handle) for o in operands):
            raise TypeError("bfloat16 reduction: convert to float32 first")
        return apply_reduction(self, operands)

    def widened(handle: Any) -> Any:
        if not is_bfloat16(handle):
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, sums: Any, *options: Any) -> Any:
        return wide_dot(self, widened(a), widened(b), sums, *options)

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, ndmin=1)).bfloat16()
        return tensor.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        if name != "ternary_op":  # that is also `where`, which only moves bits
            refuse(name)
    apply_reduction = interpreter.ReduceOps.apply_impl
    interpreter.ReduceOps.apply_impl = reduce
    builder.create_dot = dot
    interpreter._convert_float = rounded


install_bfloat16()


def banded(tensor: Tensor) -> Tensor:
    """A copy between bands of NaN (or of a wild index), so that a load outside it spoils the result."""
    wild = float("nan") if tensor.is_floating_point() else 0x7BADBAD
    buffer = torch.full((tensor.numel() + 2 * BAND,), wild, dtype=tensor.dtype)
    inner = buffer[BAND : BAND + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


class Poisoned:
    """Stands in for `torch` in a kernel's module: what it allocates is poisoned and lies between bands."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        poison = float("nan") if dtype.is_floating_point else 0x7BADBAD
        buffer = torch.full((size + 2 * BAND,), poison, dtype=dtype)
        buffer[:BAND] = buffer[BAND + size :] = 77
        self.buffers.append(buffer)
        return buffer[BAND : BAND + size].view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert bool((buffer[:BAND] == 77).all()) and bool((buffer[-BAND:] == 77).all()), "wrote out of bounds"


def poisoned(monkeypatch: Any, *modules: ModuleType) -> Poisoned:
    stand_in = Poisoned()
    for module in modules:
        monkeypatch.setattr(module, "torch", stand_in)
    return stand_in


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return banded((torch.randn(shape, generator=generator) * scale).to(dtype))


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Error of the whole by norm, relative to `scale` (by default the result); NaN counts as infinite."""
    assert got.shape == want.shape, f"{list(got.shape)} instead of {list(want.shape)}"
    size = (want if scale is None else scale).double().norm().clamp_min(1e-30)
    return float(((got.double() - want.double()).norm() / size).nan_to_num(torch.inf))
