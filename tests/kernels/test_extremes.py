"""The DSC layer at its edges, on plain torch and every instruction set, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.layer_parts import ffn_parts
from support.operator_cases import EPS, TAU, arguments, decided, wide
from torch import Tensor

from dsc_kernels import native, ops, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
SIZES = [
    # tokens, d, atoms, k
    (3, 1, 70, 4),
    (2, 4097, 130, 5),
    (2, 17, 70_000, 64),
    (300, 33, 65, 64),
    (128, 64, 64, 64),
    (1, 16, 16, 16),
    (25, 31, 1000, 1),
]
LONG = [(300, 384, 1523, 4), (7, 1024, 16_384, 32), (64, 4097, 5000, 64)]


@pytest.fixture(params=["plain", *native.available()])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.use(request.param)
    yield request.param
    ops.use("auto")


def layer(values: tuple[Any, ...]) -> ops.Ffn:
    """The layer of `dsc_layer`'s arguments."""
    *weights, k, tau, eps, norm_eps = values[2:]
    return ops.ffn(**ffn_parts(*weights, norm_eps, k=k, tau=tau, eps=eps))


def compared(values: tuple[Any, ...]) -> None:
    x, residual, router, bias, k = values[0], values[1], values[6], values[7], values[-4]
    out = layer(values)(x, residual)
    _, picks, weights, signal = layer(values).routed(x)
    want = reference.dsc_layer(*wide(values))
    want_picks, want_weights, want_signal = reference.route(*wide((x, router, bias)), *values[-4:])
    sure = decided(x, router, bias, k) | (x.shape[1] == 1)
    assert sure.float().mean() >= 0.3
    if x.shape[1] > 1:  # the norm of a single number is 0, and so is what tells atoms apart but for the bias
        assert torch.equal(picks[sure].long().sort(dim=1).values, want_picks[sure].sort(dim=1).values)
    assert bool(((picks >= 0) & (picks < len(router))).all())
    close(out[sure], want[sure], TOLERANCE[x.dtype])
    close(weights[sure].sort(dim=1).values, want_weights[sure].sort(dim=1).values, 1e-3)
    close(signal[sure], want_signal[sure], 1e-4)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert float(error.nan_to_num(torch.inf)) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_layer_matches_float64(kernels: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d, atoms, k = sizes
    compared(arguments("dsc_layer", dtype, tokens, d, atoms, k, hidden=9))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", LONG, ids=str)
def test_larger_layers_match_float64(kernels: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d, atoms, k = sizes
    compared(arguments("dsc_layer", dtype, tokens, d, atoms, k, hidden=327))


def of_logits(logits: Tensor, k: int) -> ops.Ffn:
    """A layer whose logits are the given ones for every token."""
    zero, none = torch.zeros(logits.numel(), 1), torch.zeros(1, 1)
    bank = zero, zero, torch.ones(1)
    return ops.ffn(**ffn_parts(none, None, none, "none", zero, logits, *bank, k=k, tau=TAU, eps=EPS))


@pytest.mark.parametrize("tokens", [1, 30])
def test_winners_are_found_in_every_block_of_a_large_bank(kernels: str, tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    for start in range(0, 70_000, 9_973):
        logits = torch.rand(70_000, generator=g) - 5
        winners = torch.tensor([start, 69_999 - start, (start * 7 + 13) % 70_000, (start + 34_000) % 70_000])
        logits[winners] = torch.tensor([9.0, 8.0, 7.0, 6.0])
        want = reference.select(logits[None].double(), 4, TAU)[1]
        picks = of_logits(logits, 4).routed(torch.ones(tokens, 1))[1]
        assert torch.equal(picks.long(), want.expand(tokens, -1)), start


@pytest.mark.parametrize("level", [2 * TAU, -2 * TAU])
def test_a_whole_bank_beyond_tau_ties(kernels: str, level: float) -> None:
    logits = level + torch.rand(5000, generator=torch.Generator().manual_seed(1))
    picks = of_logits(logits, 64).routed(torch.ones(26, 1))[1]
    assert torch.equal(picks.long(), torch.arange(64).expand(26, -1))


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_stay_with_their_token(kernels: str, value: float, tokens: int) -> None:
    values = arguments("dsc_layer", torch.float32, tokens, 67, 300, 5)
    x, built = values[0], layer(values)
    clean = built(x)
    x[1, 3] = value
    out, picks, _, _ = built.routed(x)
    others = torch.arange(tokens) != 1
    assert torch.equal(out[others], clean[others]) and not bool(out[1].isfinite().all())
    assert bool(((picks >= 0) & (picks < 300)).all())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_inputs_are_read_where_they_lie(kernels: str, dtype: torch.dtype) -> None:
    values = list(arguments("dsc_layer", dtype, 6, 40, 50, 4))
    want = layer(tuple(values))(*values[:2])
    for at, value in enumerate(values):
        if isinstance(value, Tensor) and value.dim() == 2:
            values[at] = value.repeat_interleave(2, dim=1)[:, ::2]
            assert not values[at].is_contiguous()
    close(layer(tuple(values))(*values[:2]), want.double(), TOLERANCE[dtype])
