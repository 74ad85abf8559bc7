"""The slots of a step's tokens, sorted by the experts that they pick."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2


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
    chained: tl.constexpr = False,
) -> None:
    """A counting sort of slots by expert, stable: grid (⌈slots / slots per block⌉,).

    Each program counts all slots, and then finds the places of its own. Whole steps are read without a mask: one by
    slot would break up the wide loads.
    """
    follow(chained)
    expert, step = tl.arange(0, width), tl.arange(0, slots_per_step)
    begin = tl.program_id(0) * slots_per_block
    totals = tl.zeros((width,), tl.int32)
    before = tl.zeros((width,), tl.int32)
    whole = slots // slots_per_step * slots_per_step
    for start in range(0, whole, slots_per_step):
        picked = tl.load(picks + start + step)
        totals += tl.histogram(picked, width)
        before += tl.histogram(tl.where(start + step < begin, picked, experts), width)
    if whole < slots:
        last = tl.load(picks + whole + step, mask=whole + step < slots, other=experts)
        totals += tl.histogram(last, width)
        before += tl.histogram(tl.where(whole + step < begin, last, experts), width)
    begins = tl.cumsum(totals, 0) - totals
    if tl.program_id(0) == 0:
        tl.store(offsets + expert, begins, mask=expert <= experts)
    place = tl.arange(0, slots_per_block)
    mine = tl.load(picks + begin + place, mask=begin + place < slots, other=experts)
    earlier = (mine[None, :] == mine[:, None]) & (place[None, :] < place[:, None])
    at = tl.gather(begins + before, mine, 0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + at, begin + place, mask=begin + place < slots)


def place_blocks(experts: int) -> Meta:
    """Slots of a program, and how many are counted at a time: four of a lane."""
    sizes = {"slots_per_block": 64, "slots_per_step": 512}
    return {"experts": experts, "width": power_of_2(experts + 1, 32), **sizes, "num_warps": 4}


def sort_by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots int32 [B · k] sorted by expert, in token order within one, and where each expert's begin, int32 [N + 1]."""
    check("experts", experts, tuple(experts.shape), torch.int32)
    slots = experts.numel()
    order = torch.empty(slots, dtype=torch.int32, device=experts.device)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=experts.device)
    meta = place_blocks(count)
    grid = (triton.cdiv(slots, meta["slots_per_block"]),)
    place_slots[grid](experts.contiguous(), order, offsets, slots, **meta, **chain())
    return order, offsets
