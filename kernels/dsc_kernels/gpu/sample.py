"""One token of each row of weights: the kept set of top-k, top-p and min-p is found by its threshold, without sorting.

Weights are between 0 and 1, so that their bits order as they do: the threshold is found by three bits of it at a time,
for each of which all weights are looked at once and measured above eight candidates.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel

BITS = 3  # of a threshold found at a time
BELOW_2 = 30  # bits that tell apart floats from 0 up to 2
WIDTH = 2048  # weights looked at together
PARAMETERS = 5  # of a row: temperature, top_k, top_p, min_p and the number in [0, 1) that is drawn with


@kernel
def threshold(
    row: tl.tensor,
    amount: tl.tensor,
    vocabulary: tl.tensor,
    by_mass: tl.constexpr,
    width: tl.constexpr,
    bits: tl.constexpr,
    all_bits: tl.constexpr,
) -> tl.tensor:
    """The bits of the largest threshold for which weights that reach it number, or sum up to, at least the amount."""
    digit = tl.arange(0, 1 << bits)
    found = tl.full((), 0, tl.int32)
    for place in range(all_bits // bits):
        shift = all_bits - bits * (place + 1)
        candidates = found + (digit << shift)
        measures = tl.zeros((1 << bits, width), tl.float64 if by_mass else tl.int32)
        for start in range(0, vocabulary, width):
            column = start + tl.arange(0, width)
            weights = tl.load(row + column, mask=column < vocabulary, other=-1.0)
            reached = weights.to(tl.int32, bitcast=True)[None, :] >= candidates[:, None]
            if by_mass:
                measures += tl.where(reached, weights[None, :].to(tl.float64), 0.0)
            else:
                measures += reached.to(tl.int32)
        enough = tl.sum((tl.sum(measures, 1).to(tl.float64) >= amount).to(tl.int32), 0)
        found += tl.maximum(enough - 1, 0) << shift
    return found


@kernel
def beyond(row: tl.tensor, bits: tl.tensor, vocabulary: tl.tensor, width: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """How many weights are larger than one, and their sum."""
    counts, sums = tl.zeros((width,), tl.int32), tl.zeros((width,), tl.float64)
    for start in range(0, vocabulary, width):
        column = start + tl.arange(0, width)
        weights = tl.load(row + column, mask=column < vocabulary, other=-1.0)
        larger = weights.to(tl.int32, bitcast=True) > bits
        counts += larger.to(tl.int32)
        sums += tl.where(larger, weights.to(tl.float64), 0.0)
    return tl.sum(counts, 0), tl.sum(sums, 0)


@kernel
def kept_weights(
    row: tl.tensor,
    start: tl.tensor,
    least: tl.tensor,
    ties: tl.tensor,
    seen: tl.tensor,
    min_p: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Weights from `start` on, in float64 with 0 for those not kept, and how many ties at the threshold were seen."""
    column = start + tl.arange(0, width)
    weights = tl.load(row + column, mask=column < vocabulary, other=-1.0)
    bits = weights.to(tl.int32, bitcast=True)
    tie = (bits == least).to(tl.int32)
    rank = seen + tl.cumsum(tie, 0) - tie
    kept = ((bits > least) | ((tie == 1) & (rank < ties))) & (weights >= min_p) & (weights > 0.0)
    return tl.where(kept, weights.to(tl.float64), 0.0), seen + tl.sum(tie, 0)


@kernel
def sample_rows(
    weights: tl.tensor,
    parameters: tl.tensor,
    tokens: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.constexpr,
    bits: tl.constexpr,
    all_bits: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One row, left as it is where its temperature is 0: grid (rows,)."""
    follow(chained)
    index = tl.program_id(0).to(tl.int64)
    row, own = weights + index * vocabulary, parameters + index * 5
    if tl.load(own) > 0.0:
        top_k, top_p = tl.load(own + 1), tl.load(own + 2)
        min_p, u = tl.load(own + 3).to(tl.float32), tl.load(own + 4)
        least = tl.full((), 0, tl.int32)
        if top_k < vocabulary:
            least = threshold(row, top_k, vocabulary, False, width, bits, all_bits)
        count, mass = beyond(row, least, vocabulary, width)
        ties = top_k.to(tl.int32) - count  # equals are kept in the order of the vocabulary
        if top_p < 1.0:
            tied = least.to(tl.float32, bitcast=True).to(tl.float64)
            amount = top_p * (mass + ties.to(tl.float64) * tied)
            higher = threshold(row, amount, vocabulary, True, width, bits, all_bits)
            if higher > least:
                least, ties = higher, vocabulary
                count, mass = beyond(row, least, vocabulary, width)
            tied = least.to(tl.float32, bitcast=True).to(tl.float64)
            if tied > 0.0:
                wanted = tl.minimum((amount - mass) / tied, 2147483000.0)
                whole = wanted.to(tl.int32)
                ties = tl.minimum(ties, tl.maximum(whole + (whole.to(tl.float64) < wanted).to(tl.int32), 1))
        total, seen = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)
        for start in range(0, vocabulary, width):
            kept, seen = kept_weights(row, start, least, ties, seen, min_p, vocabulary, width)
            total += tl.sum(kept, 0)
        target = u * total
        before, seen = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)
        first, last = tl.full((), 0, tl.int32) + vocabulary, tl.full((), 0, tl.int32)
        for start in range(0, vocabulary, width):
            kept, seen = kept_weights(row, start, least, ties, seen, min_p, vocabulary, width)
            column = start + tl.arange(0, width)
            passed = (before + tl.cumsum(kept, 0) > target) & (kept > 0.0)
            first = tl.minimum(first, tl.min(tl.where(passed, column, vocabulary), 0))
            last = tl.maximum(last, tl.max(tl.where(kept > 0.0, column, 0), 0))
            before += tl.sum(kept, 0)
        tl.store(tokens + index, tl.where(first < vocabulary, first, last).to(tl.int64))


def blocks() -> Meta:
    return {"width": WIDTH, "bits": BITS, "all_bits": BELOW_2, "num_warps": 16}


def sample(weights: Tensor, parameters: Tensor, tokens: Tensor) -> Tensor:
    """Tokens int64 [R], in place, of rows with a temperature above 0; the others' stay.

    weights: float32 [R, V] from 0 to 1, of each row the largest is 1. parameters: float64 [R, 5], of each row
    temperature, top_k from 1 to V, top_p, min_p, and u in [0, 1). The token drawn is the first of the kept set, in the
    order of the vocabulary, at which its weights sum up to more than u of their total. In falling order of weight the
    kept set is the prefix within k tokens, within those of at least min_p, and up to the first at which the mass
    reaches top_p of the k tokens' mass; equals are in the order of the vocabulary. Sums are in float64, in an order of
    their own: they may differ from others of the same numbers in the last bits.
    """
    rows, vocabulary = weights.shape
    check("weights", weights, (rows, vocabulary), torch.float32)
    check("parameters", parameters, (rows, PARAMETERS), torch.float64)
    check("tokens", tokens, (rows,), torch.int64)
    sample_rows[(rows,)](weights, parameters, tokens, vocabulary, **blocks(), **chain())
    return tokens
