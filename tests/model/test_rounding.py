"""Rounding to 4 and 8 bits, its bounds, and forms that are joined without loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsc_kernels.quantised import QuantisedWeight
from dsc_serve.model.quantised_tensor import alike, joined, widened
from dsc_serve.model.rounding import OutOfRangeError, rounded


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [96, 75, 33, 1])
@pytest.mark.parametrize("group", [16, 32])
def test_eight_bits_are_within_half_a_step(columns: int, group: int) -> None:
    weight = weights(columns=columns)
    own = rounded(weight, 8, group=group)
    step = own.scales.float().repeat_interleave(group, 1)[:, :columns]
    assert bool(((own.whole() - weight).abs() <= 0.5005 * step + 0.06 * step).all())  # the largest may round past 127
    assert float((own.whole() - weight).norm() / weight.norm()) < 0.008


@pytest.mark.parametrize("columns", [96, 75, 33])
def test_four_bits_are_better_than_the_whole_range_in_sixteen_levels(columns: int) -> None:
    weight = weights(columns=columns)
    own = rounded(weight, 4)
    parts = torch.nn.functional.pad(weight, (0, -columns % 32), mode="constant", value=torch.nan).unflatten(1, (-1, 32))
    low, high = (getattr(parts.nan_to_num(nan=fill), f"a{way}")(2) for way, fill in (("min", 1e9), ("max", -1e9)))
    step = ((high - low) / 15).clamp_min(1e-9).repeat_interleave(32, 1)[:, :columns]
    base = low.repeat_interleave(32, 1)[:, :columns]
    naive = ((weight - base) / step).round() * step + base
    assert (own.whole() - weight).norm() < 0.97 * (naive - weight).norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_equal_numbers_and_small_ones_come_back(bits: int) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.25
    weight[2, :32] = 1e-6
    own = rounded(weight, bits).whole()  # type: ignore[arg-type]
    assert torch.equal(own[0], weight[0]) and torch.equal(own[3], weight[3])
    torch.testing.assert_close(own[1], weight[1], atol=0, rtol=1e-3)
    assert float((own[2] - weight[2]).abs().max()) <= 4e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_what_float16_does_not_hold_is_refused(bits: int) -> None:
    with pytest.raises(OutOfRangeError, match=r"1e\+08"):
        rounded(torch.full((2, 32), 1e8) * torch.linspace(-1, 1, 32), bits)  # type: ignore[arg-type]


def test_forms_that_differ_are_joined_without_loss() -> None:
    own = [rounded(weights(seed=0), 4), rounded(weights(seed=1), 8, group=16), rounded(weights(seed=2), 8)]
    whole = joined(own, torch.float32)
    assert isinstance(whole, QuantisedWeight)
    assert (whole.bits, whole.group) == (8, 16)
    assert torch.equal(whole.dequantise(), torch.cat([one.dequantise() for one in own]))
    same = alike(own)
    assert len({(one.bits, one.group, one.minimums is None) for one in same}) == 1
    assert all(torch.equal(one.dequantise(), before.dequantise()) for one, before in zip(same, own, strict=True))
    assert torch.equal(widened(own[0], 4, 16).dequantise(), own[0].dequantise())


def test_a_tensor_among_them_makes_them_all_tensors() -> None:
    own = rounded(weights(), 8)
    whole = joined([own, weights(seed=1)], torch.float32)
    assert torch.equal(whole, torch.cat([own.whole(), weights(seed=1)]))  # type: ignore[arg-type]
