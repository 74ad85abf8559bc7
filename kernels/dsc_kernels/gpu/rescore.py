"""Atoms that may be among a token's best by the bounds of a router in int8, scored again from the router itself.

What is left are logits and maxima from which `select` picks what it picks from those of the router: a candidate's logit
is made by the same tile of the same product, bit for bit, and whatever is no candidate is below all that are picked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.add_norm import Moments
from dsc_kernels.gpu.arithmetic import clamp, follow
from dsc_kernels.gpu.compiler import Meta, chain, kernel, power_of_2, stages
from dsc_kernels.gpu.ffn_in import blocks, finished, route_beside
from dsc_kernels.gpu.product import PROGRAMS, rows_by_tokens
from dsc_kernels.gpu.screen import SMALLEST_STRETCH, Screen
from dsc_kernels.weights import Activation, MlpWeights

LARGEST_STRETCH = 1024
LEAST = tl.constexpr(-(1 << 31))


@kernel
def reached(
    lowest: tl.tensor,
    groups: tl.tensor,
    tau: tl.tensor,
    k: tl.constexpr,
    groups_width: tl.constexpr,
) -> tl.tensor:
    """What a token's k best truncated logits reach at least, from lower bounds of the best of each group of atoms.

    That is the k-th largest of these, of which the last bits are left out, but for −∞ where every atom is a candidate:
    of fewer groups than k, and where what is truncated to −τ may be picked.
    """
    at = tl.arange(0, groups_width)
    bits = tl.load(lowest + at, mask=at < groups, other=0.0).to(tl.int32, bitcast=True)
    keys = tl.where(at < groups, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, 0, LEAST)
    digit = tl.arange(0, 8)
    for place in range(8):
        shift = 28 - 3 * place
        candidates = found + (digit << shift)
        counts = tl.sum((keys[None, :] >= candidates[:, None]).to(tl.int32), 1)
        enough = tl.sum((counts >= k).to(tl.int32), 0)
        found += tl.maximum(enough - 1, 0) << shift
    bound = (found ^ ((found >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    bound = tl.where(bound > tau, tau, bound)
    return tl.where(bound > -tau, bound, float("-inf"))


@kernel
def place_of(rank: tl.tensor, ends: tl.tensor, steps: tl.constexpr) -> tl.tensor:
    """Where in a stretch of 2^steps candidates number `rank` are; ends: of each place, how many there are up to it."""
    found = tl.zeros_like(rank)
    for i in tl.static_range(steps):
        further = found + (1 << (steps - 1 - i))
        found = tl.where(tl.gather(ends, further - 1, 0) <= rank, further, found)
    return found


@kernel
def rescore_rows(
    x: tl.tensor,
    router: tl.tensor,
    router_bias: tl.tensor,
    rstd: tl.tensor,
    logits: tl.tensor,
    lowest: tl.tensor,
    maxima: tl.tensor,
    counts: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    tau: tl.tensor,
    places: tl.tensor,
    d: tl.constexpr,
    group: tl.constexpr,
    k: tl.constexpr,
    groups_width: tl.constexpr,
    stretch: tl.constexpr,
    steps: tl.constexpr,
    rows_per_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    d_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One token's candidates of a stretch of atoms: grid (batch, ⌈atoms / stretch⌉).

    logits holds upper bounds, and gets logits where these may be picked; maxima gets those of what was scored. The tile
    is that in which `ffn_in.route_and_raise` computes the token, without the others' numbers.
    """
    follow(chained)
    own = tl.program_id(0).to(tl.int64)
    bound = reached(lowest + own * groups, groups, tau, k, groups_width)
    place = tl.arange(0, stretch)
    atom = tl.program_id(1) * stretch + place
    row_of_own = logits + own * groups * group
    upper = tl.load(row_of_own + atom, mask=atom < groups * group, other=float("-inf"))
    candidate = (atom < atoms) & ~(upper < bound)  # one that is NaN is a candidate
    ends = tl.cumsum(candidate.to(tl.int32), 0)
    count = tl.sum(candidate.to(tl.int32), 0)
    scored = tl.full((stretch,), float("-inf"), tl.float32)
    token = own // tokens_per_block * tokens_per_block + tl.arange(0, tokens_per_block)
    is_token = token == own
    in_tile = tl.arange(0, rows_per_block)
    for first in range(0, count, rows_per_block):
        is_row = first + in_tile < count
        found = place_of(tl.minimum(first + in_tile, count - 1), ends, steps)
        row = (tl.program_id(1) * stretch + found).to(tl.int64)
        sums = tl.zeros((rows_per_block, tokens_per_block), tl.float32)
        sums = rows_by_tokens(sums, router, row, is_row, x, token, is_token, 0, 1, d, d_per_step)
        logit = clamp(finished(sums, rstd, router_bias, row, is_row, token, is_token), tau)
        value = tl.sum(tl.where(is_token[None, :], logit, 0.0), 1)
        turn = ends - 1 - first
        here = candidate & (turn >= 0) & (turn < rows_per_block)
        scored = tl.where(here, tl.gather(value, tl.where(here, turn, 0), 0), scored)
    tl.store(row_of_own + atom, scored, mask=candidate)
    known = tl.where(scored == scored, scored, float("-inf"))
    best = tl.max(tl.reshape(known, (stretch // group, group)), 1)
    of_stretch = tl.program_id(1) * (stretch // group) + tl.arange(0, stretch // group)
    tl.store(maxima + own * groups + of_stretch, best, mask=of_stretch < groups)
    if counts is not None:
        told = counts + own * places
        if tl.program_id(1) == 0:
            tl.store(told, tl.load(told) + 1)
        mine = told + 1 + tl.program_id(1)
        tl.store(mine, tl.load(mine) + count)


def stretch_of(batch: int, atoms: int) -> int:
    """Atoms of a program: as many as leave two programs for each multiprocessor."""
    stretch = LARGEST_STRETCH
    while stretch > SMALLEST_STRETCH and batch * triton.cdiv(atoms, stretch) < 2 * PROGRAMS:
        stretch //= 2
    return stretch


def rescore_blocks(batch: int, atoms: int, groups: int, k: int, tiles: Meta) -> Meta:
    """Those of the tiles of logits that are not screened, and widths of a selection."""
    own = {name: value for name, value in tiles.items() if name != "span"} | {"num_stages": stages(3)}
    stretch = stretch_of(batch, atoms)
    widths = {"groups_width": power_of_2(groups), "stretch": stretch, "steps": stretch.bit_length() - 1}
    return {**own, "k": k, **widths}


def screened_beside(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    moments: Moments,
    tau: float,
    k: int,
    screen: Screen,
    mlp: MlpWeights | None,
    activation: Activation,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """As `ffn_in.route_beside`, of logits and maxima what a choice of the k best needs; the rest is below these.

    moments: of the rows of x, ‖x‖ among them. At most SCREENED_TOKENS tokens.
    """
    rstd, length = moments
    scores, hidden = route_beside(x, router, router_bias, rstd, tau, mlp, activation, screen, length)
    assert scores is not None
    logits, lowest = scores
    (batch, d), (atoms, groups) = x.shape, (router.shape[0], lowest.shape[1])
    maxima = torch.empty(batch, groups, dtype=torch.float32, device=x.device)
    if batch:
        outputs, gated = (0, False) if mlp is None else (mlp.up.shape[0], mlp.gate is not None)
        meta = rescore_blocks(
            batch, atoms, groups, k, blocks(batch, atoms + outputs, router.dtype, mlp is not None, gated)
        )
        rescore_rows[(batch, triton.cdiv(atoms, meta["stretch"]))](
            *(x.contiguous(), router, router_bias, rstd, logits, lowest, maxima, screen.counts),
            *(atoms, groups, tau, screen.counts.shape[1]),
            d=d,
            **meta,
            **chain(),
        )
    return (logits, maxima), hidden
