"""The basis of LoRA-XS (arXiv 2405.17604): the first singular vectors of the base's own weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.weights import Pair


def singular_pair(weight: Tensor, rank: int) -> Pair:
    """Of W [out, in] ≈ U Σ V: down V [rank, in] and up U Σ [out, rank], float32, each vector with a sign of its own.

    By the smaller of W Wᵀ and Wᵀ W in float64, whose rounding is far from the first vectors of a weight. A sign makes
    the largest number of each row of V positive, so that every machine finds the same.
    """
    wide = weight.double()
    tall = wide.shape[0] > wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    _, vectors = torch.linalg.eigh(gram)  # rising
    kept = vectors[:, -rank:].flip(1)  # [small, rank]
    if tall:
        down, up = kept.T, wide @ kept
    else:
        products = kept.T @ wide  # Σ V
        sigma = products.norm(dim=1)
        down, up = products / sigma.clamp(min=1e-30)[:, None], kept * sigma
    signs = torch.gather(down, 1, down.abs().argmax(1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    return Pair((down * signs).float().contiguous(), (up * signs.T).float().contiguous())
