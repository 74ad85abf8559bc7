"""Which experts a token picks, with which weights, and the slots that they fill sorted by expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.add_norm import Normed, Parts, add_norm_row
from dsc_kernels.gpu.add_norm import blocks as norm_blocks
from dsc_kernels.gpu.arithmetic import key_index, largest, order_key
from dsc_kernels.gpu.compiler import Meta, check, kernel, power_of_2
from dsc_kernels.weights import MoeOptions, NormWeights, Router

FEW_NUMBERS = 1 << 16  # of a router that each token's program reads by itself

Picked = tuple[Tensor, Tensor]  # weights float32 [B, k] and experts int32 [B, k], the best choice first


@kernel
def pick_of_token(
    logits: tl.tensor,
    choice_bias: tl.tensor,
    weights_out: tl.tensor,
    experts_out: tl.tensor,
    token: tl.tensor,
    weight_scale: tl.tensor,
    k: tl.constexpr,
    k_width: tl.constexpr,
    experts: tl.constexpr,
    width: tl.constexpr,
    sigmoid: tl.constexpr,
    normalize: tl.constexpr,
    groups: tl.constexpr,
    groups_used: tl.constexpr,
    group_picks: tl.constexpr,
) -> None:
    """Choose among logits [width] of one token; see `reference.pick_experts`."""
    expert = tl.arange(0, width)
    is_expert = expert < experts
    if sigmoid:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        powers = tl.where(is_expert, tl.exp(logits - tl.max(tl.where(is_expert, logits, float("-inf")), 0)), 0.0)
        scores = powers / tl.sum(powers, 0)
    choices = scores
    if choice_bias is not None:
        choices = scores + tl.load(choice_bias + expert, mask=is_expert, other=0.0)
    allowed = is_expert
    if groups > 1:
        per_group: tl.constexpr = experts // groups
        group = expert  # there are no more groups than experts
        best_of = tl.full((width,), float("-inf"), tl.float32)
        for g in range(groups):
            own = tl.where(is_expert & (expert // per_group == g), choices, float("-inf"))
            best = tl.max(own, 0)
            if group_picks == 2:
                first = tl.min(tl.where(own == best, expert, width), 0)
                best += tl.max(tl.where(expert == first, float("-inf"), own), 0)
            best_of = tl.where(group == g, best, best_of)
        keys = order_key(best_of, group, group < groups)
        allowed = expert < 0
        for _ in range(groups_used):
            top = tl.max(keys, 0)
            allowed = allowed | (is_expert & (expert // per_group == key_index(top)))
            keys = tl.where(keys == top, -(1 << 63), keys)
    picked = key_index(largest(order_key(choices, expert, allowed), k, k_width))
    rank = tl.arange(0, k_width)
    weights = tl.sum(tl.where(picked[:, None] == expert[None, :], scores[None, :], 0.0), 1)
    weights = tl.where(rank < k, weights, 0.0)
    if normalize:
        weights = weights / tl.sum(weights, 0)
    tl.store(weights_out + token * k + rank, weights * weight_scale, mask=rank < k)
    tl.store(experts_out + token * k + rank, picked, mask=rank < k)


@kernel
def pick_tokens(
    logits: tl.tensor,
    choice_bias: tl.tensor,
    weights_out: tl.tensor,
    experts_out: tl.tensor,
    logits_stride: tl.tensor,
    weight_scale: tl.tensor,
    k: tl.constexpr,
    k_width: tl.constexpr,
    experts: tl.constexpr,
    width: tl.constexpr,
    sigmoid: tl.constexpr,
    normalize: tl.constexpr,
    groups: tl.constexpr,
    groups_used: tl.constexpr,
    group_picks: tl.constexpr,
) -> None:
    """One token: grid (batch,)."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, width)
    own = tl.load(logits + token * logits_stride + expert, mask=expert < experts, other=0.0)
    pick_of_token(
        own,
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
) -> None:
    """The sum, its norm and the choice of one token, where experts are few: grid (batch,)."""
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
        part_stride,
        token_stride,
        norm_eps,
        rstd_eps,
        token,
        count,
        d,
        d_width,
    )
    column = tl.arange(0, d_width)
    inside = column < d
    factor = 1.0
    if folded:
        moved = tl.where(inside, normed - tl.sum(normed, 0) / d, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(moved * moved, 0) / d + rstd_eps)
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
def place_slots(
    picks: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    slots: tl.tensor,
    experts: tl.constexpr,
    width: tl.constexpr,
    slots_per_block: tl.constexpr,
    slots_per_step: tl.constexpr,
) -> None:
    """A counting sort of slots by expert, stable: grid (⌈slots / slots per block⌉,).

    Each program counts all slots, and then finds the places of its own.
    """
    expert, step = tl.arange(0, width), tl.arange(0, slots_per_step)
    begin = tl.program_id(0) * slots_per_block
    totals = tl.zeros((width,), tl.int32)
    before = tl.zeros((width,), tl.int32)
    for start in range(0, slots, slots_per_step):
        picked = tl.load(picks + start + step, mask=start + step < slots, other=experts)
        totals += tl.histogram(picked, width)
        before += tl.histogram(tl.where(start + step < begin, picked, experts), width)
    begins = tl.cumsum(totals, 0) - totals
    if tl.program_id(0) == 0:
        tl.store(offsets + expert, begins, mask=expert <= experts)
    place = tl.arange(0, slots_per_block)
    mine = tl.load(picks + begin + place, mask=begin + place < slots, other=experts)
    earlier = (mine[None, :] == mine[:, None]) & (place[None, :] < place[:, None])
    at = tl.gather(begins + before, mine, 0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + at, begin + place, mask=begin + place < slots)


def pick_blocks(experts: int, options: MoeOptions) -> Meta:
    """Vector widths and what is chosen by."""
    return {
        "k": options.k,
        "k_width": power_of_2(options.k),
        "experts": experts,
        "width": max(power_of_2(experts), power_of_2(options.k)),
        "sigmoid": options.scoring == "sigmoid",
        "normalize": options.normalize,
        "groups": options.groups,
        "groups_used": options.groups_used,
        "group_picks": options.group_picks,
        "num_warps": 1,
    }


def place_blocks(slots: int, experts: int) -> Meta:
    """Slots of a program, and how many are counted at a time."""
    sizes = {"slots_per_block": 64, "slots_per_step": 128 if slots <= 128 else 1024}
    return {"experts": experts, "width": power_of_2(experts + 1, 32), **sizes, "num_warps": 4}


def add_norm_pick_blocks(experts: int, d: int, options: MoeOptions, folded: bool) -> Meta:
    """Those of the sum and its norm, and those of the choice."""
    meta = norm_blocks(d)
    return {**pick_blocks(experts, options), **meta, "d_width": meta["width"], "folded": folded} | {
        "width": pick_blocks(experts, options)["width"]
    }


def few_experts(experts: int, d: int) -> bool:
    """Whether a token's program reads the whole router: a product of its own would be mostly a launch."""
    return experts <= 16 and experts * d <= FEW_NUMBERS


def picked_like(x: Tensor, k: int) -> Picked:
    shape = x.shape[0], k
    weights = torch.empty(*shape, dtype=torch.float32, device=x.device)
    return weights, torch.empty(*shape, dtype=torch.int32, device=x.device)


def pick_experts(logits: Tensor, options: MoeOptions, choice_bias: Tensor | None) -> Picked:
    """As `reference.pick_experts`, of logits float32 [B, N] (rows may be strided)."""
    batch, experts = logits.shape
    check("logits", logits, (batch, experts), torch.float32)
    picked = picked_like(logits, options.k)
    if batch:
        scale = options.weight_scale
        pick_tokens[(batch,)](*(logits, choice_bias, *picked, logits.stride(0), scale), **pick_blocks(experts, options))
    return picked


def norm_and_pick(
    residual: Tensor, parts: Parts | None, norm: NormWeights, router: Router, options: MoeOptions
) -> tuple[Normed, Picked]:
    """`add_norm.add_norm`, and the experts that a router [N, d] with few rows picks for what is normed."""
    batch, d = residual.shape
    experts = router.weight.shape[0]
    assert isinstance(router.weight, Tensor)
    x = residual if parts is None else torch.empty(batch, d, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(batch, d, dtype=residual.dtype, device=residual.device)
    picked = picked_like(residual, options.k)
    terms, count, part_stride, token_stride, further = parts or (None, 0, 0, 0, None)
    if batch:
        add_norm_pick[(batch,)](
            *(residual, terms, further, None if parts is None else x, norm.weight, norm.bias, normed),
            *(router.weight, router.bias, router.choice_bias, *picked),
            *(part_stride, token_stride, norm.eps, router.norm_eps or 0.0, options.weight_scale),
            count=count,
            **add_norm_pick_blocks(experts, d, options, router.norm_eps is not None),
        )
    return Normed(x, normed, None), picked


def sort_by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots int32 [B · k] sorted by expert, in token order within one, and where each expert's begin, int32 [N + 1]."""
    check("experts", experts, tuple(experts.shape), torch.int32)
    slots = experts.numel()
    order = torch.empty(slots, dtype=torch.int32, device=experts.device)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=experts.device)
    meta = place_blocks(slots, count)
    place_slots[(triton.cdiv(slots, meta["slots_per_block"]),)](experts.contiguous(), order, offsets, slots, **meta)
    return order, offsets
