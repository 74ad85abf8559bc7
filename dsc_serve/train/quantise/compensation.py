"""Low-rank compensation of what rounding lost, after EoRA (Liu et al. 2024).

The residual's best approximation is sought where the calibration's inputs lie: in the space that their second moments'
eigenvectors and eigenvalues stretch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dsc_kernels.quantised import QuantisedWeight
from dsc_serve.train.quantise.feedback import damped

POWER_STEPS = 40  # of the norm of a matrix too large for its singular values
EXACT = 2048


def compensated(weight: Tensor, rounded: QuantisedWeight, squares: Tensor | None, rank: int) -> QuantisedWeight:
    """The same with left [out, rank] and right [rank, in] in float16, which add what they can of the residual.

    squares: xᵀx [in, in]; None: all inputs count alike.
    """
    rank = min(rank, *weight.shape)
    residual = weight.double() - rounded.dequantise(torch.float64)
    if squares is None:
        stretched, back = residual, None
    else:
        values, vectors = torch.linalg.eigh(damped(squares))
        roots = values.clamp_min(1e-12 * float(values.max())).sqrt()
        stretched, back = residual @ vectors * roots, (vectors / roots).T
    u, s, v = torch.linalg.svd(stretched, full_matrices=False)
    right = v[:rank] if back is None else v[:rank] @ back
    # As large as each other, row by row, so that float16 holds both.
    lengths = right.norm(dim=1, keepdim=True).clamp_min(1e-30)
    share = (s[:rank, None] * lengths).sqrt()
    left, right = u[:, :rank] * share.T, right / lengths * share
    return replace(rounded, compensation=(left.half().contiguous(), right.half().contiguous()))


def norm_is_estimated(matrix: Tensor) -> bool:
    """Whether `spectral_norm` estimates a matrix's norm, from below: both of its sides are above 2048."""
    return min(matrix.shape) > EXACT


def spectral_norm(matrix: Tensor) -> float:
    """‖matrix‖₂; where `norm_is_estimated` by power iteration, which may end below it."""
    if not norm_is_estimated(matrix):
        return float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    x = torch.randn(matrix.shape[1], 1, generator=torch.Generator().manual_seed(0))
    wide = matrix.float()
    for _ in range(POWER_STEPS):
        x = wide.T @ (wide @ (x / x.norm().clamp_min(1e-30)))
    return math.sqrt(float(x.norm()))
