"""What a mixture of experts begins with: the sum, its norm and the router's logits, or its choice, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels import launch_time
from dsc_kernels.gpu.add_norm import Normed, Parts, add_norm_row
from dsc_kernels.gpu.add_norm import blocks as norm_blocks
from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, kernel, power_of_2
from dsc_kernels.gpu.pick_experts import Picked, pick_blocks, pick_experts, pick_of_token, picked_like
from dsc_kernels.weights import OUTPUT_ONLY, LayerOutputs, MoeOptions, NormWeights, Router

FEW_EXPERTS, FEW_NUMBERS = 16, 1 << 16  # of a router that each token's program reads by itself, and picks by
ENOUGH_PROGRAMS = 264


class Routed(NamedTuple):
    """A norm with the choice of experts for what it gives, and the weight of a shared expert, float32 [B]."""

    normed: Normed
    picked: Picked
    shared_weights: Tensor | None


@kernel
def weigh_shared(
    normed: tl.tensor,
    shared_gate: tl.tensor,
    shared_weights: tl.tensor,
    token: tl.tensor,
    writes: tl.tensor,
    d: tl.constexpr,
    d_width: tl.constexpr,
) -> None:
    """sigmoid(gate · normed) of one token, where `writes`."""
    column = tl.arange(0, d_width)
    gate = tl.load(shared_gate + column, mask=column < d, other=0.0)
    tl.store(shared_weights + token, tl.sigmoid(tl.sum(gate * normed, 0)), mask=writes)


@kernel
def folded_factor(
    normed: tl.tensor, rstd_eps: tl.tensor, d: tl.constexpr, d_width: tl.constexpr, folded: tl.constexpr
) -> tl.tensor:
    """What logits of a router whose norm is folded into it are multiplied by: 1 / standard deviation; 1 of others."""
    factor = 1.0
    if folded:
        moved = tl.where(tl.arange(0, d_width) < d, normed - tl.sum(normed, 0) / d, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(moved * moved, 0) / d + rstd_eps)
    return factor


@kernel
def add_norm_pick(
    residual: tl.tensor,
    terms: tl.tensor,
    further: tl.tensor,
    total_out: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    normed_out: tl.tensor,
    router: tl.tensor,
    router_bias: tl.tensor,
    choice_bias: tl.tensor,
    weights_out: tl.tensor,
    experts_out: tl.tensor,
    shared_gate: tl.tensor,
    shared_weights: tl.tensor,
    part_stride: tl.tensor,
    token_stride: tl.tensor,
    norm_eps: tl.tensor,
    rstd_eps: tl.tensor,
    weight_scale: tl.tensor,
    count: tl.constexpr,
    d: tl.constexpr,
    d_width: tl.constexpr,
    folded: tl.constexpr,
    k: tl.constexpr,
    k_width: tl.constexpr,
    experts: tl.constexpr,
    width: tl.constexpr,
    sigmoid: tl.constexpr,
    normalize: tl.constexpr,
    groups: tl.constexpr,
    groups_used: tl.constexpr,
    group_picks: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """The sum, its norm and the choice of one token, where experts are few: grid (batch,)."""
    follow(chained)
    token = tl.program_id(0).to(tl.int64)
    normed = add_norm_row(
        residual,
        terms,
        further,
        total_out,
        norm_weight,
        norm_bias,
        normed_out,
        None,
        None,
        part_stride,
        token_stride,
        norm_eps,
        rstd_eps,
        token,
        None,
        count,
        d,
        d_width,
    )
    if shared_gate is not None:
        weigh_shared(normed, shared_gate, shared_weights, token, True, d, d_width)
    column = tl.arange(0, d_width)
    inside = column < d
    factor = folded_factor(normed, rstd_eps, d, d_width, folded)
    expert = tl.arange(0, width)
    logits = tl.zeros((width,), tl.float32)
    for e in range(experts):
        row = tl.load(router + e * d + column, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(expert == e, tl.sum(row * normed, 0) * factor, logits)
    if router_bias is not None:
        logits += tl.load(router_bias + expert, mask=expert < experts, other=0.0)
    pick_of_token(
        logits,
        choice_bias,
        weights_out,
        experts_out,
        token,
        weight_scale,
        k,
        k_width,
        experts,
        width,
        sigmoid,
        normalize,
        groups,
        groups_used,
        group_picks,
    )


@kernel
def add_norm_score(
    residual: tl.tensor,
    terms: tl.tensor,
    further: tl.tensor,
    total_out: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    normed_out: tl.tensor,
    router: tl.tensor,
    router_bias: tl.tensor,
    logits: tl.tensor,
    shared_gate: tl.tensor,
    shared_weights: tl.tensor,
    part_stride: tl.tensor,
    token_stride: tl.tensor,
    norm_eps: tl.tensor,
    rstd_eps: tl.tensor,
    logits_stride: tl.tensor,
    count: tl.constexpr,
    d: tl.constexpr,
    d_width: tl.constexpr,
    folded: tl.constexpr,
    experts: tl.constexpr,
    experts_per_block: tl.constexpr,
    experts_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """The sum, its norm and some logits of one token, where experts are many: grid (batch, ⌈experts / per block⌉).

    Each program computes the norm by itself, and the first of a token stores it.
    """
    follow(chained)
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    normed = add_norm_row(
        residual,
        terms,
        further,
        total_out,
        norm_weight,
        norm_bias,
        normed_out,
        None,
        None,
        part_stride,
        token_stride,
        norm_eps,
        rstd_eps,
        token,
        tile == 0,
        count,
        d,
        d_width,
    )
    if shared_gate is not None:
        weigh_shared(normed, shared_gate, shared_weights, token, tile == 0, d, d_width)
    column = tl.arange(0, d_width)
    factor = folded_factor(normed, rstd_eps, d, d_width, folded)
    for start in tl.static_range(0, experts_per_block, experts_per_step):
        expert = tile * experts_per_block + start + tl.arange(0, experts_per_step)
        inside = (expert < experts)[:, None] & (column < d)[None, :]
        rows = tl.load(router + expert[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(rows * normed[None, :], 1) * factor
        if router_bias is not None:
            scores += tl.load(router_bias + expert, mask=expert < experts, other=0.0)
        tl.store(logits + token * logits_stride + expert, scores, mask=expert < experts)


def add_norm_pick_blocks(experts: int, d: int, options: MoeOptions, folded: bool) -> Meta:
    """Those of the sum and its norm, and those of the choice."""
    meta = norm_blocks(d)
    return {**pick_blocks(experts, options), **meta, "d_width": meta["width"], "folded": folded} | {
        "width": pick_blocks(experts, options)["width"]
    }


def score_blocks(batch: int, experts: int, d: int, folded: bool) -> Meta:
    """A program's experts: enough programs to fill a GPU, and of many tokens more work for each norm."""
    width = power_of_2(d)
    per_block = 8 if batch * triton.cdiv(experts, 8) <= ENOUGH_PROGRAMS else 16
    per_step = min(max(16384 // width, 1), 8)
    sizes = {"experts": experts, "experts_per_block": per_block, "experts_per_step": per_step}
    return {"d": d, "d_width": width, "folded": folded, **sizes, "num_warps": min(max(width // 256, 1), 8)}


def few_experts(experts: int, d: int) -> bool:
    """Whether a token's program reads the whole router: a product of its own would be mostly a launch."""
    return experts <= FEW_EXPERTS and experts * d <= FEW_NUMBERS


def scored_beside(batch: int, experts: int, d: int) -> bool:
    """Whether logits are computed where the norm is: each token's programs read the router, which a product does not.

    That is so where it takes less time than a launch more, and than the few programs that such a product has.
    """
    return few_experts(experts, d) or launch_time.scored_beside(experts, d, batch)


def norm_and_pick(
    residual: Tensor,
    parts: Parts | None,
    norm: NormWeights,
    router: Router,
    options: MoeOptions,
    shared_gate: Tensor | None = None,
    outputs: LayerOutputs = OUTPUT_ONLY,
) -> Routed:
    """`add_norm.add_norm`, and the experts that a router [N, d] picks for what is normed: see `scored_beside`.

    shared_gate float32 [d]: where given, sigmoid(gate · normed) is computed, too. Few experts are picked in the same
    launch, of many the logits are computed in it.
    """
    (batch, d), experts = residual.shape, router.weight.shape[0]
    assert isinstance(router.weight, Tensor)
    x = residual if parts is None else torch.empty(batch, d, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(batch, d, dtype=residual.dtype, device=residual.device)
    weighed = None if shared_gate is None else torch.empty(batch, dtype=torch.float32, device=residual.device)
    terms, count, part_stride, token_stride, further = parts or (None, 0, 0, 0, None)
    sums = (residual, terms, further, None if parts is None else x, norm.weight, norm.bias, normed)
    strides, epsilons = (part_stride, token_stride), (norm.eps, router.norm_eps or 0.0)
    folded, found = router.norm_eps is not None, Normed(x, normed, None)
    if few_experts(experts, d):
        picked = picked_like(residual, options.k, outputs)
        if batch:
            add_norm_pick[(batch,)](
                *(*sums, router.weight, router.bias, router.choice_bias, *picked, shared_gate, weighed),
                *(*strides, *epsilons, options.weight_scale),
                count=count,
                **add_norm_pick_blocks(experts, d, options, folded),
                **chain(),
            )
        return Routed(found, picked, weighed)
    # Rows of whole 16s: then each is aligned, and wide loads read it
    width = triton.cdiv(experts, 16) * 16
    logits = torch.empty(batch, width, dtype=torch.float32, device=residual.device)[:, :experts]
    if batch:
        meta = score_blocks(batch, experts, d, folded)
        add_norm_score[(batch, triton.cdiv(experts, meta["experts_per_block"]))](
            *(*sums, router.weight, router.bias, logits, shared_gate, weighed, *strides, *epsilons, width),
            count=count,
            **meta,
            **chain(),
        )
    return Routed(found, pick_experts(logits, options, router.choice_bias, outputs), weighed)
