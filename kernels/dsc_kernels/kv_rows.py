"""Rows of keys and values in int8: numbers and, behind them, what 1 is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.weights import SCALE_BYTES

LEAST_SCALED = 1e-30  # below which numbers of a row count as 0


def narrow_rows(rows: Tensor) -> Tensor:
    """Rows [..., size] as a cache in int8 has them: [..., size + SCALE_BYTES]. What is not finite makes a row NaN."""
    wide = rows.float()
    most = wide.abs().amax(-1, keepdim=True)
    most = torch.where(most.isfinite(), torch.where(most < LEAST_SCALED, 0.0, most), torch.nan)
    inverse = most.new_full((), 127.0) / most  # `127 / most` is 127 times a rounded reciprocal: another level at times
    levels = (wide * torch.where(most > 0, inverse, 0.0)).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8)
    return torch.cat((levels, (most / 127).view(torch.int8)), dim=-1)


def widened_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The same back: [..., size]."""
    behind = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)  # where they lie is no float's place
    scales = behind.view(torch.float32)
    return (rows[..., :-SCALE_BYTES].float() * scales).to(dtype)
