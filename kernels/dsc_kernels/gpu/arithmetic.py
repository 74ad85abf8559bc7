"""Functions that kernels share: float32 arithmetic without device libraries, and keys that sort like logits."""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsc_kernels.gpu.compiler import kernel

EMPTY = tl.constexpr(-(1 << 63))  # sorts below every key of an atom
LOWEST = tl.constexpr(-(1 << 31) + 1)  # the upper half of a NaN's key, below that of −∞


@kernel
def follow(chained: tl.constexpr) -> None:
    """The first line of every kernel that is launched; chained: see `compiler.chain`.

    Behind it lies all that earlier launches have written, and what they still read is read no more. The next launch may
    begin when all programs of this one have: it waits here in its turn.
    """
    if chained:
        gdc_launch_dependents()
        gdc_wait()


@kernel
def clamp(x: tl.tensor, tau: tl.tensor) -> tl.tensor:
    """x between −τ and τ; NaN stays NaN, which tl.clamp leaves open."""
    return tl.where(x > tau, tau, tl.where(x < -tau, -tau, x))


@kernel
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp x), accurate also where exp x vanishes beside 1."""
    small = tl.exp(-tl.abs(x))
    sum_ = 1.0 + small
    # log(1 + e) with the rounding error of 1 + e divided out
    tail = tl.where(sum_ == 1.0, small, tl.log(sum_) * (small / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
    return tl.where(x > 0.0, x, 0.0) + tl.where(x == x, tail, x)


@kernel
def tanh_positive(s: tl.tensor) -> tl.tensor:
    """tanh of s ≥ 0: near zero a series, since there the quotient of exponentials cancels."""
    square = s * s
    series = s * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decay = tl.exp(-2.0 * s)
    return tl.where(s < 0.25, series, (1.0 - decay) / (1.0 + decay))


@kernel
def bounded(scores: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """cap · tanh(scores / cap), with scores and cap in base 2."""
    ratio = tl.abs(scores / cap) * 2.8853900817779268  # 2 / ln 2 of the exponent of e
    decay = tl.exp2(-ratio)
    tanh = (1.0 - decay) / (1.0 + decay)
    return tl.where(scores < 0.0, -tanh, tanh) * cap


@kernel
def activate(x: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """x after "none", "gelu" (exact), "gelu_tanh" or "silu"."""
    if activation == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if activation == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if activation == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@kernel
def order_key(value: tl.tensor, index: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """int64 keys that sort like (value descending, index ascending): all different, NaN below −∞, invalid ones last."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # −0 ties with 0, as numbers do
    ordered = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(valid, key, EMPTY)


@kernel
def key_value(key: tl.tensor) -> tl.tensor:
    """The float32 value in a key."""
    ordered = (key >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(ordered == LOWEST, float("nan"), value)


@kernel
def key_index(key: tl.tensor) -> tl.tensor:
    """The int32 index in a key; 0 for an empty one."""
    index = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
    return tl.where(key == EMPTY, 0, index)


@kernel
def largest(keys: tl.tensor, k: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    """The k largest of distinct keys [n], in descending order, in a vector of `width` ≥ k that empty keys fill.

    `width` is a power of two, n one that is no smaller. A few are found one by one; more by a bitonic network, whose
    steps are independent of k but for their logarithm.
    """
    rank = tl.arange(0, width)
    if width <= 2:
        picked = tl.full((width,), EMPTY, tl.int64)
        for i in range(k):
            best = tl.max(keys, 0)
            picked = tl.where(rank == i, best, picked)
            keys = tl.where(keys == best, EMPTY, keys)
    else:
        picked = tl.where(rank < k, tl.topk(keys, width), EMPTY)
    return picked
