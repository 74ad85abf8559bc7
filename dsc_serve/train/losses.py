"""The paper's training terms, and those of the baselines. Reductions in float32 or wider.

Source: arXiv 2512.23448, section on training, and its reference script; the mixtures' load term is Switch's
(Fedus et al. 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LoadAndZ(torch.autograd.Function):
    """Both terms take one softmax of all logits, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lse = wide.logsumexp(-1, keepdim=True)
        p = wide.softmax(-1)
        mean = p.mean(0)
        ctx.save_for_backward(p, mean, lse)
        ctx.dtype = logits.dtype
        return logits.shape[1] * mean.square().sum(), lse.square().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        p, mean, lse = ctx.saved_tensors
        tokens, atoms = p.shape
        factor = grads[0] * (2 * atoms / tokens) * (mean - (p @ mean)[:, None]) + grads[1] * (2 / tokens) * lse
        dlogits: Tensor = factor.mul_(p).to(ctx.dtype)
        return dlogits


def load_and_z(logits: Tensor, tau: float, z_of: str) -> tuple[Tensor, Tensor]:
    """M Σ_j P_j², P the mean of softmax(clamped logits) over tokens, and the mean of logsumexp². logits [B, M]."""
    if float(logits.detach().abs().amax()) <= tau:
        load, z = _LoadAndZ.apply(logits)  # type: ignore[no-untyped-call]
        return load, z
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    clamped = wide.clamp(-tau, tau)
    load = logits.shape[1] * clamped.softmax(-1).mean(0).square().sum()
    return load, (wide if z_of == "raw" else clamped).logsumexp(-1).square().mean()


def budget(signal: Tensor, floor: float) -> Tensor:
    """max(0, μ − mean S)² for the tokens' signals S."""
    return (floor - signal.mean()).clamp_min(0).square()


def frame(rows: Tensor) -> Tensor:
    """Σ_{i≠j} (r_i·r_j)² for rows [M, d] in O(d² M): ‖RᵀR‖²_F − Σ ‖r_i‖⁴."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (wide.T @ wide).square().sum() - wide.square().sum(1).square().sum()


def mixture_load(probabilities: Tensor, picked: Tensor) -> Tensor:
    """N/B² Σ_e (Σ_b p_be) (tokens that picked e). probabilities [B, N], picked int64 [B, k]."""
    tokens, experts = probabilities.shape
    counts = torch.bincount(picked.flatten(), minlength=experts).to(probabilities.dtype)
    return experts / tokens**2 * (probabilities.sum(0) * counts).sum()
