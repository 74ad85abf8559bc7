"""The registered operators on Triton's kernels, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import honest
from support.operator_cases import arguments, decided, wide

from dsc_kernels import library, ops, reference
from dsc_kernels.gpu import layers


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    ops.use("triton")
    yield
    ops.use("auto")


# where the router's weight and k stand among the arguments, for operators that select
CASES: dict[str, tuple[int, int] | None] = {
    "route": (1, 3),
    "compose": None,
    "dsc_layer": (6, -4),
    "molora_layer": (6, -2),
    "moe_layer": (2, -3),
    "decode_attention": None,
}


@pytest.mark.parametrize("dtype", honest.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_an_operator_equals_its_twin(name: str, dtype: torch.dtype) -> None:
    values, case = arguments(name, dtype, tokens=5, d=67, atoms=21, k=3), CASES[name]
    got = getattr(torch.ops.dsc, name)(*values)
    oracle: Any = getattr(reference, name)
    want = values[0].double() + oracle(*wide(values[1:])) if name == "compose" else oracle(*wide(values))
    sure = torch.ones(5, dtype=torch.bool)
    if case is not None:
        router, k = case
        sure = decided(values[0], values[router], values[router + 1], values[k])
    if name == "route":
        assert torch.equal(got[0][sure].long(), want[0][sure]) and got[0].dtype == torch.int32
        got, want = got[1], want[1]
    else:
        assert got.dtype == dtype
    assert sure.any() and honest.error(got[sure], want[sure]) < 1.3 * honest.TOLERANCE[dtype]


def test_triton_computes_them() -> None:
    library.layers.clear()
    assert library.separate(torch.ones(1)) is layers
    values = arguments("moe_layer", torch.float32, 3, 16, 9, 2)
    torch.ops.dsc.moe_layer(*values)
    torch.ops.dsc.moe_layer(*values)
    assert len(library.layers) == 1, "the experts are copied into one tensor once"
