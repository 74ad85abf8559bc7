"""The guard itself: it must catch what the bare interpreter lets pass."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from support import honest

from dsc_kernels.gpu.compiler import kernel


@kernel
def add(x: tl.tensor, out: tl.tensor, n: tl.constexpr, widen: tl.constexpr) -> None:
    values = tl.load(x + tl.arange(0, n))
    if widen:
        values = values.to(tl.float32)
    tl.store(out + tl.arange(0, n), (values + values).to(out.dtype.element_ty))


@kernel
def total(x: tl.tensor, out: tl.tensor, n: tl.constexpr) -> None:
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, n)), 0).to(tl.float32))


def test_bfloat16_arithmetic_raises() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="convert to float32 first"):
        add[(1,)](x, torch.empty(16), n=16, widen=False)
    with pytest.raises(Exception, match="convert to float32 first"):
        total[(1,)](x, torch.empty(1), n=16)


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([1 / 3, 1e-40])])
    x = torch.cat([x, torch.zeros(22), torch.tensor([float("inf"), float("nan")])])[:1024] / 2
    out = torch.empty(1024, dtype=torch.bfloat16)
    add[(1,)](x, out, n=1024, widen=True)
    assert torch.equal(out.view(torch.int16), (x + x).bfloat16().view(torch.int16))


def test_a_store_outside_is_noticed() -> None:
    stand_in = honest.Poisoned()
    out = stand_in.empty(8, dtype=torch.float32, device=torch.device("cpu"))
    add[(1,)](torch.ones(16), out, n=16, widen=True)
    with pytest.raises(AssertionError, match="out of bounds"):
        stand_in.check()
