"""A token's numbers do not hang on how many tokens are computed beside it: they are the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.layer_parts import ffn_parts, moe_parts
from support.native_cases import DTYPES, moe_layer, random, routed_layer
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.native.head import Head

COUNTS = (1, 2, 3, 4, 5, 16, 17, 24, 25, 32, 33)
MOST = 70

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]


def check(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    whole = layer(x)
    assert bool(whole.isfinite().all())
    for count in COUNTS:
        assert torch.equal(layer(x[:count]), whole[:count]), count
        assert torch.equal(layer(x[-count:]), whole[-count:]), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "n"), [(1, 1), (31, 16), (32, 70), (33, 130), (64, 17), (97, 64), (576, 200)])
@pytest.mark.parametrize("scale", [1.0, 1e-19, 1e-22, 1e-38])  # products and numbers that tiles take for 0, too
def test_products(dtype: torch.dtype, d: int, n: int, scale: float) -> None:
    g = torch.Generator().manual_seed(d)
    weight, x = random(g, dtype, n, d, scale=scale), random(g, dtype, MOST, d, scale=scale)
    layer = native.Linear(weight)
    check(lambda rows: layer(rows, out_dtype=torch.float32), x)
    wide = layer(x, out_dtype=torch.float32).double()
    sizes = x.double().abs() @ weight.double().abs().T
    assert bool(((wide - x.double() @ weight.double().T).abs() <= 2e-6 * sizes + d * 2.0**-125).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["exact", "int8-certified"])
def test_heads(dtype: torch.dtype, precision: str) -> None:
    g = torch.Generator().manual_seed(1)
    native.use_head(precision)  # type: ignore[arg-type]
    head = Head(random(g, dtype, 2000, 96))
    check(head.argmax, random(g, dtype, MOST, 96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["exact", "int8-certified"])
def test_routed_layers(dtype: torch.dtype, precision: str) -> None:
    g = torch.Generator().manual_seed(2)
    native.use_router(precision)  # type: ignore[arg-type]
    layer = native.Ffn(**ffn_parts(**routed_layer(g, dtype, 96, 700, 4, 75)))
    x = random(g, dtype, MOST, 96)
    check(layer, x)
    check(lambda rows: layer.routed(rows)[1].float(), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixtures_of_experts(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    layer = native.Moe(**moe_parts(**moe_layer(g, dtype, 96, 70, 5, 2)))
    check(layer, random(g, dtype, MOST, 96))
