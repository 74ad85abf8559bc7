"""Rounding with error feedback, GPTQ's (Frantar et al. 2022): column by column, by second moments of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.quantised import Bits, QuantisedWeight
from dsc_serve.model.quantised_tensor import packed
from dsc_serve.model.rounding import GROUP, OutOfRangeError, check_range, grids, levels_of, value_of

DAMPING = 0.01  # of the mean second moment, added to each: inputs that hardly vary say little


def damped(squares: Tensor) -> Tensor:
    """Second moments float64 [in, in] that can be inverted; an input that was always 0 counts as one by itself."""
    moments = squares.double().clone()
    diagonal = moments.diagonal()
    level = float(diagonal.mean())
    diagonal += DAMPING * level if level > 0 else 1.0
    return moments


def rounded_with_feedback(weight: Tensor, squares: Tensor, bits: Bits) -> QuantisedWeight:
    """A weight float32 [out, in], each column's rounding error made up for by the columns that are still to come.

    squares: xᵀx [in, in] over the calibration's inputs. Raises OutOfRangeError, as rounding without it does.
    """
    check_range(weight, bits)
    rows, columns = weight.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(squares)))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float().clone()
    levels = torch.empty(rows, columns, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales, minimums = [], []
    for start in range(0, columns, GROUP):
        end = min(start + GROUP, columns)
        block = left[:, start:end]  # a view: what follows is taken off from it
        scale, minimum = grids(block[:, None], bits)
        scales.append(scale)
        minimums.append(minimum)
        errors = torch.empty_like(block)
        for i in range(end - start):
            column, at = block[:, i : i + 1], start + i
            level = levels_of(column[:, None], scale, minimum, bits)
            levels[:, at] = level[:, 0, 0]
            errors[:, i] = (column - value_of(level, scale, minimum)[:, 0])[:, 0] / factor[at, at]
            block[:, i + 1 :] -= errors[:, i : i + 1] * factor[at, at + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    every, least = torch.cat(scales, dim=1), torch.cat(minimums, dim=1)
    if not bool((every.isfinite() & least.isfinite()).all()):
        raise OutOfRangeError(f"its largest number is {float(weight.abs().max()):.3g}")
    return QuantisedWeight(
        packed(levels, bits), every, least if bits == 4 else None, bits, GROUP, (rows, columns), None, torch.float32
    )
