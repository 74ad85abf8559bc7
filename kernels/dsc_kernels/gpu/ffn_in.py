"""What a routed layer begins with: the router's logits and the static MLP's hidden activations, side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import activate, clamp, follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel
from dsc_kernels.gpu.product import rows_by_tokens, tiles
from dsc_kernels.gpu.screen import GROUP as GROUP
from dsc_kernels.gpu.screen import SPAN, Screen, largest_error, levels_by_tokens
from dsc_kernels.weights import Activation, MlpWeights


@kernel
def finished(
    sums: tl.tensor,
    rstd: tl.tensor,
    router_bias: tl.tensor,
    atom: tl.tensor,
    is_atom: tl.tensor,
    token: tl.tensor,
    is_token: tl.tensor,
) -> tl.tensor:
    """Logits [atoms, tokens] of sums: times 1 / standard deviation, plus the bias, rounded once for both."""
    if rstd is not None:
        scale = tl.load(rstd + token, mask=is_token, other=0.0)[None, :]
        if router_bias is not None:
            sums = tl.fma(sums, scale, tl.load(router_bias + atom, mask=is_atom, other=0.0)[:, None])
        else:
            sums *= scale
    elif router_bias is not None:
        sums += tl.load(router_bias + atom, mask=is_atom, other=0.0)[:, None]
    return sums


@kernel
def route_and_raise(
    x: tl.tensor,
    router: tl.tensor,
    router_bias: tl.tensor,
    rstd: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    errors: tl.tensor,
    length: tl.tensor,
    logits: tl.tensor,
    maxima: tl.tensor,
    up: tl.tensor,
    up_bias: tl.tensor,
    gate: tl.tensor,
    gate_bias: tl.tensor,
    hidden: tl.tensor,
    batch: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    tau: tl.tensor,
    outputs: tl.tensor,
    d: tl.constexpr,
    group: tl.constexpr,
    activation: tl.constexpr,
    rows_per_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    d_per_step: tl.constexpr,
    span: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One tile of logits, or behind those of hidden activations: grid (⌈batch / tokens⌉, tiles of rows of both).

    With levels of the router, logits are upper bounds, and maxima are of lower ones.
    """
    follow(chained)
    token = (tl.program_id(0) * tokens_per_block + tl.arange(0, tokens_per_block)).to(tl.int64)
    is_token = token < batch
    tile = tl.program_id(1)
    router_tiles = 0
    if router is not None:
        router_tiles = (atoms + rows_per_block - 1) // rows_per_block
        if tile < router_tiles:
            atom = (tile * rows_per_block + tl.arange(0, rows_per_block)).to(tl.int64)
            is_atom = atom < atoms
            sums = tl.zeros((rows_per_block, tokens_per_block), tl.float32)
            if levels is None:
                sums = rows_by_tokens(sums, router, atom, is_atom, x, token, is_token, 0, 1, d, d_per_step)
                high = clamp(finished(sums, rstd, router_bias, atom, is_atom, token, is_token), tau)
                low = high
            else:
                padded = groups * group
                sums = levels_by_tokens(
                    sums, levels, scales, atom, is_atom, x, token, is_token, padded, d, span, d_per_step
                )
                logit = finished(sums, rstd, router_bias, atom, is_atom, token, is_token)
                error = largest_error(errors, router_bias, rstd, length, atom, is_atom, token, is_token)
                high = logit + error
                low = logit - error
            out = logits + token[None, :] * groups * group + atom[:, None]
            tl.store(out, high, mask=is_token[None, :] & (atom < groups * group)[:, None])
            known = tl.where(is_atom[:, None] & (low == low), low, float("-inf"))
            best = tl.max(tl.reshape(known, (rows_per_block // group, group, tokens_per_block)), 1)
            of_tile = tl.arange(0, rows_per_block // group)
            at = tile * (rows_per_block // group) + of_tile
            tl.store(
                maxima + token[None, :] * groups + at[:, None], best, mask=is_token[None, :] & (at < groups)[:, None]
            )
    if up is not None:  # noqa: SIM102  this is decided when the kernel is compiled
        if tile >= router_tiles:
            row = ((tile - router_tiles) * rows_per_block + tl.arange(0, rows_per_block)).to(tl.int64)
            is_row = row < outputs
            raised = tl.zeros((rows_per_block, tokens_per_block), tl.float32)
            if gate is None:
                raised = rows_by_tokens(raised, up, row, is_row, x, token, is_token, 0, 1, d, d_per_step)
            else:
                gates = tl.zeros((rows_per_block, tokens_per_block), tl.float32)
                step = tl.arange(0, d_per_step)
                rows_at = row[:, None] * d + step[None, :]
                columns = x + token[None, :] * d + step[:, None]
                for start in range(0, d, d_per_step):
                    inside = start + step < d
                    is_weight = is_row[:, None] & inside[None, :]
                    tokens = tl.load(columns + start, mask=is_token[None, :] & inside[:, None], other=0.0)
                    up_tile = tl.load(up + rows_at + start, mask=is_weight, other=0.0)
                    raised = tl.dot(up_tile, tokens, raised, input_precision="ieee")
                    gate_tile = tl.load(gate + rows_at + start, mask=is_weight, other=0.0)
                    gates = tl.dot(gate_tile, tokens, gates, input_precision="ieee")
                if gate_bias is not None:
                    gates += tl.load(gate_bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
            if up_bias is not None:
                raised += tl.load(up_bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
            raised = activate(raised, activation) if gate is None else activate(gates, activation) * raised
            out_hidden = hidden + token[None, :] * outputs + row[:, None]
            tl.store(out_hidden, raised.to(hidden.dtype.element_ty), mask=is_token[None, :] & is_row[:, None])


def blocks(batch: int, rows: int, dtype: torch.dtype, beside: bool = True, gated: bool = False) -> Meta:
    """Tile sizes: those of a product; of both kinds of rows, or with two weights at a time, smaller ones."""
    meta = tiles(batch, rows, dtype)
    if beside and meta["tokens_per_block"] > 64:
        meta |= {"tokens_per_block": 64}
    if gated and meta["rows_per_block"] > 64:
        meta |= {"rows_per_block": 64}
    if gated and dtype == torch.float32 and meta["tokens_per_block"] > 32:
        meta |= {"d_per_step": 16}
    return {**meta, "group": GROUP, "span": SPAN}


def route_beside(
    x: Tensor,
    router: Tensor | None,
    router_bias: Tensor | None,
    rstd: Tensor | None,
    tau: float,
    mlp: MlpWeights | None,
    activation: Activation,
    screen: Screen | None = None,
    length: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Logits and group maxima of a router [M, d], and hidden activations [B, H] of an MLP, of what there is of both.

    Logits are float32 [B, M], a view of rows of ⌈M/16⌉ · 16, and truncated to ±τ; maxima [B, ⌈M/16⌉] are those of each
    16. With rstd [B] the router is a folded one (`reference.fold_router_norm`): clamp(rstd · x W″ᵀ + b′, −τ, τ).
    A NaN stays NaN among the logits and counts as −∞ in the maxima. x [B, d] is in the weights' dtype.

    With a screen, for which length [B] has ‖x‖ of each row, the router is not read: logits are upper bounds of what
    they would be, not truncated, and maxima are of lower bounds (see `rescore`).
    """
    batch, d = x.shape
    weights = [weight for weight in (router, None if mlp is None else mlp.up) if isinstance(weight, Tensor)]
    dtype = weights[0].dtype
    check("x", x, (batch, d), dtype)
    atoms, outputs, groups = 0, 0, 0
    scores: tuple[Tensor, Tensor] | None = None
    hidden, up, gate = None, None, None
    if router is not None:
        atoms = router.shape[0]
        check("router", router, (atoms, d), dtype)
        groups = triton.cdiv(atoms, GROUP)
        # Rows of whole groups: then each is aligned, and wide loads read it and wide stores write it
        logits = torch.empty(batch, groups * GROUP, dtype=torch.float32, device=x.device)[:, :atoms]
        scores = logits, torch.empty(batch, groups, dtype=torch.float32, device=x.device)
    if mlp is not None:
        up, gate, outputs = mlp.up, mlp.gate, mlp.up.shape[0]
        assert isinstance(up, Tensor)
        check("up", up, (outputs, d), dtype)
        hidden = torch.empty(batch, outputs, dtype=x.dtype, device=x.device)
    bounds = (None,) * 4 if screen is None else (screen.levels, screen.scales, screen.errors, length)
    if batch:
        meta = blocks(batch, atoms + outputs, dtype, mlp is not None, gate is not None)
        height = meta["rows_per_block"]
        grid = (triton.cdiv(batch, meta["tokens_per_block"]), triton.cdiv(atoms, height) + triton.cdiv(outputs, height))
        biases = (None, None, None) if mlp is None else mlp.biases
        route_and_raise[grid](
            *(x.contiguous(), router, router_bias, rstd, *bounds, *(scores or (None, None))),
            *(up, biases[0], gate, biases[1], hidden),
            *(batch, atoms, groups, tau, outputs),
            d=d,
            activation=activation,
            **meta,
            **chain(),
        )
    return scores, hidden


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, tau: float, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The logits and group maxima alone; see `route_beside`."""
    scores, _ = route_beside(x, weight, bias, rstd, tau, None, "none")
    assert scores is not None
    return scores
