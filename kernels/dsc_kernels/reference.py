"""The layers' mathematics in plain torch, in any floating dtype: the oracle of every test.

Shapes: B tokens, d width, M atoms, K atoms per token, N experts or adapters, r adapter rank.
Source: V. Khasia, "Dynamic Subspace Composition", arXiv 2512.23448; equation names follow its Algorithm 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(rows: Tensor, eps: float) -> Tensor:
    """Rows [M, d] divided by max(their 2-norm, eps): norm at most 1, a zero row stays zero."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(eps)


def fold_router_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """A router that applies LayerNorm's affine part and centring through its weights.

    weight [M, d], bias [M] → W″ [M, d] with centred rows and b′ [M], so that
    LayerNorm(x) Wᵀ + b = rstd(x) · (x W″ᵀ) + b′, since a centred row takes no notice of x's mean.
    """
    scaled = weight * norm_weight
    folded_bias = weight @ norm_bias
    if bias is not None:
        folded_bias = folded_bias + bias
    return scaled - scaled.mean(dim=1, keepdim=True), folded_bias


def reciprocal_std(x: Tensor, norm_eps: float) -> Tensor:
    """LayerNorm's 1 / √(variance + eps) per row of x [B, d] → [B, 1]."""
    return torch.rsqrt(x.var(dim=1, correction=0, keepdim=True) + norm_eps)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None, norm_eps: float | None) -> Tensor:
    """Raw logits [B, M] from x [B, d]; with norm_eps the weight is a folded one (`fold_router_norm`)."""
    logits = x @ weight.T
    if norm_eps is not None:
        logits = logits * reciprocal_std(x, norm_eps)
    return logits if bias is None else logits + bias


def select(logits: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """The k largest of clamp(logits, −τ, τ) [B, M] → values [B, k] and indices [B, k].

    Ordered by clamped logit descending, then index ascending: also the rule where the clamp makes logits tie.
    """
    ordered = torch.sort(logits.clamp(-tau, tau), dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def coefficients(selected: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ẑ [B, K] and the signal S [B] from the selected truncated logits [B, K]; Σ ẑ < 1."""
    phi = F.softplus(selected, threshold=30.0)
    signal = phi.sum(dim=1, keepdim=True)
    return phi / (signal + eps) * torch.tanh(signal), signal.squeeze(1)


def compose(x: Tensor, atoms: Tensor, weights: Tensor, u: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """The dynamic part (Σ_j (x·u_j) ẑ_j v_j) ⊙ γ [B, d] for the atoms [B, K] with coefficients [B, K]."""
    latent = torch.einsum("bd,bkd->bk", x, u[atoms]) * weights
    return torch.einsum("bk,bkd->bd", latent, v[atoms]) * gamma


def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The MoE router: the k largest softmax probabilities over all N experts, not renormalised, and their indices."""
    ordered = torch.sort(logits.softmax(dim=1), dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]
