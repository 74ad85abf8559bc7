"""Which rows a token picks of logits, and what the picked rows make, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.dequantised import rows_by
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import AtomBank


def order_keys(values: Tensor) -> Tensor:
    """int64 keys [B, M] of float32 values that sort like (value, −index): all different, so top-k is exact."""
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return (ordered.to(torch.int64) << 32) | columns


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of float32 values [B, M], falling, and where they are, int64 [B, k]; ties in order."""
    indices = (values.shape[1] - 1) - (order_keys(values).topk(k, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, indices), indices


def select(logits: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """`reference.select` for float32 logits [B, M] without sorting a row; a NaN ranks below every number."""
    clamped = logits.clamp(-tau, tau) + 0.0  # + 0.0 makes −0 and 0 tie, as numbers do
    _, atoms = top_k(torch.where(clamped.isnan(), -torch.inf, clamped), k)
    return clamped.gather(1, atoms), atoms


def compose_add(
    static: Tensor, x: Tensor, atoms: Tensor, weights: Tensor, u: Weight, v: Weight, gamma: Tensor
) -> Tensor:
    """static [B, d] plus the dynamic part of the picked atoms, in float32."""
    latent = torch.einsum("bd,bkd->bk", x.float(), rows_by(u, torch.float32)(atoms)) * weights
    return static.float() + torch.einsum("bk,bkd->bd", latent, rows_by(v, torch.float32)(atoms)) * gamma


def compose_rows(static: Tensor, x: Tensor, picked: Tensor, weights: Tensor, bank: AtomBank, rank: int = 0) -> Tensor:
    """`backend.Backend.compose_rows` in torch."""
    rows = picked
    if rank:
        rows = (picked[:, :, None] * rank + torch.arange(rank, device=x.device)).flatten(1)
        weights = weights.repeat_interleave(rank, dim=1)
    return compose_add(static, x, rows, weights, bank.u, bank.v, bank.gamma.float()).to(x.dtype)
