"""Products and look-ups in plain torch of weights that may be quantised.

Quantised ones stand for float32 numbers, some rows of them at a time, and inputs stay as they are: nothing is rounded
but the result. So this is what the kernels' products, whose inputs are rounded to int8, are close to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels.quantised import QuantisedWeight, Weight

WIDE_ROWS = 4096  # of a narrow weight that are in float32 at a time


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in x's dtype: x [B, d] → [B, n]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    y = wide_product(x, weight)
    return (y if bias is None else y + bias).to(x.dtype)


def wide_product(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ with its float32 sums, which are not rounded to x's and the weight's narrower dtype."""
    if isinstance(weight, Tensor) and x.device.type != "cpu":
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = [slice(start, start + WIDE_ROWS) for start in range(0, weight.shape[0], WIDE_ROWS)]
    take = rows_by(weight, wide.dtype)
    y = torch.cat([F.linear(wide, take(part)) for part in parts], dim=1)
    if isinstance(weight, QuantisedWeight) and weight.compensation is not None:
        left, right = (side.to(wide.dtype) for side in weight.compensation)
        y += F.linear(F.linear(wide, right), left)
    return y


def rows_by(weight: Weight, dtype: torch.dtype) -> Callable[[Tensor | slice], Tensor]:
    """What gives some rows of a weight in a dtype: index [...] → [..., d], without a compensation."""
    if isinstance(weight, Tensor):
        return lambda index: weight[index].to(dtype)
    return lambda index: weight.take(index, dtype)


def embed(weight: Weight, ids: Tensor) -> Tensor:
    """Rows of an embedding [words, d] in its dtype: ids [T] → [T, d]."""
    if isinstance(weight, Tensor):
        return F.embedding(ids, weight)
    rows = weight.take(ids)
    if weight.compensation is not None:
        left, right = weight.compensation
        rows += left[ids].float() @ right.float()
    return rows.to(weight.dtype)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor of this dtype, compensation included."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.whole(dtype)
