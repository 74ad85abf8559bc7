"""What is passed to C++: addresses of tensors that were checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels.quantised import Weight

IS_BF16 = {torch.float32: 0, torch.bfloat16: 1}


def is_bf16(dtype: torch.dtype) -> int:
    """How the module is told float32 and bfloat16 apart. Raises ValueError for other dtypes."""
    if dtype not in IS_BF16:
        raise ValueError(f"native kernels compute in float32 and bfloat16, not in {dtype}")
    return IS_BF16[dtype]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def check(name: str, tensor: Weight, shape: tuple[int, ...], dtype: torch.dtype, in_place: bool = False) -> None:
    """Raise ValueError unless a tensor is such a one on the CPU; in_place: and contiguous, so that it needs no copy."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {got}; expected {dtype} {list(shape)} on the CPU")
    if in_place and isinstance(tensor, Tensor) and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but has strides {tensor.stride()}")


def check_all(shapes: Mapping[str, tuple[Weight | None, tuple[int, ...]]], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless those tensors that there are have these shapes and, where it matters, this dtype."""
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            check(name, tensor, shape, dtype or tensor.dtype)
