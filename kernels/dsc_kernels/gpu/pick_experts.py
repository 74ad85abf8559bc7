"""Which experts a token picks of its logits, and with which weights."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow, key_index, largest, order_key
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2
from dsc_kernels.gpu.select import room
from dsc_kernels.weights import OUTPUT_ONLY, LayerOutputs, MoeOptions

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
    chained: tl.constexpr = False,
) -> None:
    """One token: grid (batch,)."""
    follow(chained)
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


def picked_like(x: Tensor, k: int, outputs: LayerOutputs) -> Picked:
    """Room for weights and experts of x [B, d], where outputs want them."""
    weights = room(outputs.weights, torch.float32, x, x.shape[0], k)
    return weights, room(outputs.picks, torch.int32, x, x.shape[0], k)


def pick_experts(
    logits: Tensor, options: MoeOptions, choice_bias: Tensor | None, outputs: LayerOutputs = OUTPUT_ONLY
) -> Picked:
    """As `reference.pick_experts`, of logits float32 [B, N] (rows may be strided); written to what outputs have."""
    batch, experts = logits.shape
    check("logits", logits, (batch, experts), torch.float32)
    picked = picked_like(logits, options.k, outputs)
    if batch:
        scale = options.weight_scale
        pick_tokens[(batch,)](
            *(logits, choice_bias, *picked, logits.stride(0), scale), **pick_blocks(experts, options), **chain()
        )
    return picked
