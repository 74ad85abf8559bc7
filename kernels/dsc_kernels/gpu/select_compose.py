"""Selection, composition and the sum with the static output in one launch: what a DSC layer does after its GEMMs."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.compiler import Meta, check, kernel, power_of_2
from dsc_kernels.gpu.select import prepare_logits, select_atoms, sizes


@kernel
def spread(values: tl.tensor, width: tl.constexpr, rank_width: tl.constexpr) -> tl.tensor:
    """Each of values [width] repeated for the rows of its adapter: [width · rank_width]."""
    return tl.reshape(tl.broadcast_to(values[:, None], (width, rank_width)), (width * rank_width,))


@kernel
def select_compose_tokens(
    logits: tl.tensor,
    maxima: tl.tensor,
    x: tl.tensor,
    u: tl.tensor,
    v: tl.tensor,
    gamma: tl.tensor,
    static: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    picks: tl.tensor,
    coefficients: tl.tensor,
    signals: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    k: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    groups_width: tl.constexpr,
    rank: tl.constexpr,
    rank_width: tl.constexpr,
    softmax: tl.constexpr,
    scalar_gamma: tl.constexpr,
    d: tl.constexpr,
    d_per_step: tl.constexpr,
) -> None:
    """One token: grid (batch,)."""
    token = tl.program_id(0).to(tl.int64)
    atom, weights, signal = select_atoms(
        logits + token * groups * group,
        maxima + token * groups,
        atoms,
        groups,
        eps,
        k,
        width,
        group,
        groups_width,
        softmax,
    )
    place = tl.arange(0, width)
    if picks is not None:
        tl.store(picks + token * k + place, atom, mask=place < k)
        tl.store(coefficients + token * k + place, weights, mask=place < k)
        tl.store(signals + token, signal)

    step = tl.arange(0, d_per_step)
    if rank_width == 1:
        row = atom
        is_row = place < k
    else:
        adapter_row = tl.arange(0, rank_width)
        row = tl.reshape(atom[:, None] * rank + adapter_row[None, :], (width * rank_width,))
        is_row = tl.reshape((place < k)[:, None] & (adapter_row < rank)[None, :], (width * rank_width,))
        weights = spread(weights, width, rank_width)
    rows = row.to(tl.int64)[:, None] * d + step[None, :]
    latent = tl.zeros((width * rank_width,), tl.float32)
    for start in range(0, d, d_per_step):
        inside = start + step < d
        x_tile = tl.load(x + token * d + start + step, mask=inside, other=0.0).to(tl.float32)
        u_tile = tl.load(u + rows + start, mask=is_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        latent += tl.sum(u_tile * x_tile[None, :], 1)
    latent = tl.where(is_row, latent * weights, 0.0)
    for start in range(0, d, d_per_step):
        inside = start + step < d
        at = token * d + start + step
        v_tile = tl.load(v + rows + start, mask=is_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        scale = tl.load(gamma) if scalar_gamma else tl.load(gamma + start + step, mask=inside, other=0.0)
        total = tl.sum(v_tile * latent[:, None], 0) * scale
        total += tl.load(static + at, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def blocks(k: int, groups: int, d: int, rank: int) -> Meta:
    """Widths and warps: about 64 gathered values a lane."""
    rank_width = power_of_2(max(rank, 1))
    rows = power_of_2(k) * rank_width
    warps = 1 if rows <= 4 else 2 if rows <= 8 else 4
    tiles = {"d_per_step": min(power_of_2(d), max(2048 * warps // rows, 64))}
    return {**sizes(k, groups), "rank": max(rank, 1), "rank_width": rank_width, **tiles, "d": d, "num_warps": warps}


def select_compose(
    logits: Tensor,
    maxima: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gamma: Tensor,
    static: Tensor,
    residual: Tensor | None,
    k: int,
    eps: float,
    rank: int = 0,
    traced: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """static [B, d] + the composition of each token's k best atoms + residual, in x's dtype.

    logits and maxima from `router.router_logits`; x [B, d]; u, v [atoms · max(rank, 1), d]; gamma float32 [d] or [1].
    rank: 0 for DSC; otherwise rows per adapter, weighed by the softmax of what was picked. With `traced` also atoms
    int32 [B, k], coefficients float32 [B, k] and signal [B].
    """
    logits, atoms, groups = prepare_logits(logits, maxima, k)
    batch, d = logits.shape[0], x.shape[1]
    rows = atoms * max(rank, 1)
    named = {"x": (x, batch), "u": (u, rows), "v": (v, rows), "static": (static, batch)}
    if residual is not None:
        named["residual"] = (residual, batch)
    for name, (tensor, length) in named.items():
        check(name, tensor, (length, d))
    check("gamma", gamma, (gamma.numel(),), torch.float32)
    if gamma.numel() not in (1, d):
        raise ValueError(f"gamma has {gamma.numel()} values; expected 1 or {d}")
    out = torch.empty(batch, d, dtype=x.dtype, device=x.device)
    trace = None
    if traced:
        trace = (
            torch.empty(batch, k, dtype=torch.int32, device=x.device),
            torch.empty(batch, k, dtype=torch.float32, device=x.device),
            torch.empty(batch, dtype=torch.float32, device=x.device),
        )
    if batch:
        inputs = (maxima, x, u, v, gamma, static)
        select_compose_tokens[(batch,)](
            *(logits, *(t.contiguous() for t in inputs)),
            *(None if residual is None else residual.contiguous(), out, *(trace or (None, None, None))),
            *(atoms, groups, eps),
            **blocks(k, groups, d, rank),
            softmax=rank > 0,
            scalar_gamma=gamma.numel() == 1,
        )
    return out, trace
