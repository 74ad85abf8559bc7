"""Measures the constants that `plan.choose` needs, on this machine's CPU, with the threads torch is set to.

Gathering is timed where it happens, inside a layer: the difference between two layers that pick more and fewer rows of
the same bank. Rows come as adapters of 16, so that routing, of which there is little, does not blur the difference.
Ends within some seconds.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

from dsc_kernels import grouping, ops
from dsc_kernels.plan import DeviceConstants, Level
from dsc_kernels.weights import AtomBank, FfnOptions, MlpWeights, Router

WIDTH, RANK, TOKENS = 2048, 16, 192
MANY, FEW = 4, 1  # adapters picked
BANKS = (1 << 20, 16 << 20, 128 << 20)  # bytes: within one core's cache, within all cores', beyond
STREAMED = 128 << 20
REPEATS = 7


def calibrate(dtype: torch.dtype, source: str) -> DeviceConstants:
    """The constants for layers of this dtype. `source` says where they are from."""
    rates = [gather_seconds_per_byte(size, dtype) for size in BANKS]
    rates = [max(rates[: i + 1]) for i in range(len(rates))]  # a larger bank is never nearer
    limits = [math.sqrt(a * b) for a, b in itertools.pairwise(BANKS)]
    narrow, wide = order_seconds(4), order_seconds(64)
    pick = max(0.0, (wide - narrow) / 60)
    return DeviceConstants(
        gather=tuple(Level(*pair) for pair in zip((*limits, math.inf), rates, strict=True)),
        stream=stream_rate(dtype),
        flops={str(kind).removeprefix("torch."): product_rate(kind) for kind in {dtype, torch.float32}},
        order_token=max(0.0, narrow - 4 * pick),
        order_pick=pick,
        source=source,
    )


def median_seconds(*runs: Callable[[], object]) -> list[float]:
    """Of each, over repeats in turn, after one that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(REPEATS + 1):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repeat:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def gather_seconds_per_byte(size: int, dtype: torch.dtype) -> float:
    """Of composing tokens whose rows lie anywhere in a bank of so many bytes."""
    row = 2 * WIDTH * dtype.itemsize
    adapters = max(MANY, size // (row * RANK))
    g = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=g) * columns**-0.5
        return drawn.to(dtype)

    up, down, router = weight(16, WIDTH), weight(WIDTH, 16), weight(adapters, WIDTH)
    bank = AtomBank(weight(adapters * RANK, WIDTH), weight(adapters * RANK, WIDTH), torch.ones(1))
    x = torch.randn(TOKENS * torch.get_num_threads(), WIDTH, generator=g).to(dtype)
    options = (FfnOptions(activation="gelu", k=k, rank=RANK, tau=20.0) for k in (MANY, FEW))
    many, few = (ops.ffn(MlpWeights(up, None, down), option, Router(router), bank) for option in options)
    more, less = median_seconds(lambda: many(x), lambda: few(x))
    return max(more - less, 1e-9) / (len(x) * (MANY - FEW) * RANK * row)


def stream_rate(dtype: torch.dtype) -> float:
    """Bytes/s of weights that one token's product reads."""
    linear = ops.linear(torch.full((STREAMED // (WIDTH * dtype.itemsize), WIDTH), 1e-3, dtype=dtype))
    x = torch.ones(1, WIDTH, dtype=dtype)
    return STREAMED / median_seconds(lambda: linear(x))[0]


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    linear = ops.linear(torch.full((WIDTH, WIDTH), 1e-3, dtype=dtype))
    x = torch.full((512, WIDTH), 1e-2, dtype=dtype)
    return 2 * len(x) * WIDTH**2 / median_seconds(lambda: linear(x))[0]


def order_seconds(k: int) -> float:
    """Of ordering a token with k atoms, among as many as a thread orders at a time, by all threads at once."""
    picks = torch.randint(1 << 16, (TOKENS, k), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    (seconds,) = median_seconds(lambda: [grouping.min_hash_order(picks) for _ in range(20)])
    return seconds / (20 * TOKENS * torch.get_num_threads())
