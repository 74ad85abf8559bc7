"""The operators that models call: each picks the fastest implementation there is for its inputs' device.

Selection is float32, exact and specified: by clamped logit descending, then index ascending.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import reference


def description() -> str:
    """Which implementations serve on this machine, for logs and `inspect`."""
    return "plain torch"


def order_keys(values: Tensor) -> Tensor:
    """int64 keys [B, M] of float32 values that sort like (value, −index): all different, so top-k is exact."""
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return (ordered.to(torch.int64) << 32) | columns


def select(logits: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """`reference.select` for float32 logits [B, M] without sorting a row."""
    clamped = logits.clamp(-tau, tau) + 0.0  # + 0.0 makes −0 and 0 tie, as numbers do
    atoms = (clamped.shape[1] - 1) - (order_keys(clamped).topk(k, dim=1).values & 0xFFFFFFFF)
    return clamped.gather(1, atoms), atoms


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_eps: float | None, k: int, tau: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick k atoms for each token.

    x [B, d] of any dtype; weight [M, d] and bias [M] in float32, folded with the router's norm when norm_eps is given.
    Returns atoms int64 [B, k], coefficients ẑ float32 [B, k] and the signal S float32 [B].
    """
    selected, atoms = select(reference.router_logits(x.float(), weight, bias, norm_eps), k, tau)
    weights, signal = reference.coefficients(selected, eps)
    return atoms, weights, signal


def compose_add(
    static: Tensor, x: Tensor, atoms: Tensor, weights: Tensor, u: Tensor, v: Tensor, gamma: Tensor
) -> Tensor:
    """static [B, d] plus the dynamic part of the picked atoms; sums in float32, result in static's dtype."""
    latent = torch.einsum("bd,bkd->bk", x.float(), u[atoms].float()) * weights
    dynamic = torch.einsum("bk,bkd->bd", latent, v[atoms].float()) * gamma
    return (static.float() + dynamic).to(static.dtype)


def expert_groups(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Sort the picks [B, k] by expert: positions in the flattened picks [B·k], and how many picks each expert has."""
    flat = experts.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts).tolist()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, in] times weight [out, in] transposed."""
    return F.linear(x, weight, bias)
