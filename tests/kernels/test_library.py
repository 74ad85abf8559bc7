"""The operators as PyTorch sees them: against their twins, traced, compiled, and with the layers that they keep."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.operator_cases import arguments, decided, wide
from torch import Tensor

from dsc_kernels import library, native, ops, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:var.{3} degrees of freedom"),  # torch warns of a variance of no rows
]

NAMES = ("route", "compose", "dsc_layer", "molora_layer", "moe_layer", "decode_attention")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@pytest.fixture(params=["plain", *native.available()])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.use(request.param)
    yield request.param
    ops.use("auto")


def operator(name: str) -> Any:
    return getattr(torch.ops.dsc, name)


def twin(name: str, values: tuple[Any, ...]) -> Any:
    """The oracle's result; its composition has no static part."""
    if name == "compose":
        static, *rest = wide(values)
        return static + reference.compose(*rest)
    return getattr(reference, name)(*wide(values))


def error(got: Tensor, want: Tensor) -> float:
    size = want.double().norm().clamp_min(1e-30)
    return float(((got.double() - want.double()).norm() / size).nan_to_num(torch.inf))


def routed(name: str, values: tuple[Any, ...]) -> Tensor:
    """Rows of the result that may be compared: those whose selection no rounding decides."""
    if name in ("compose", "decode_attention"):
        return torch.ones(len(values[0]), dtype=torch.bool)
    at = {"route": (1, 3), "dsc_layer": (6, -4), "molora_layer": (6, -2), "moe_layer": (2, -3)}[name]
    return decided(values[0], values[at[0]], values[at[0] + 1], values[at[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "d", "atoms", "k", "gated"),
    [(0, 8, 5, 2, False), (1, 1, 1, 1, True), (5, 67, 21, 3, True), (40, 48, 9, 2, False)],
)
@pytest.mark.parametrize("name", NAMES)
def test_an_operator_equals_its_twin(
    kernels: str, name: str, tokens: int, d: int, atoms: int, k: int, gated: bool, dtype: torch.dtype
) -> None:
    values = arguments(name, dtype, tokens, d, atoms, k, gated=gated)
    before = [v.clone() for v in values if isinstance(v, Tensor)]
    got, want = operator(name)(*values), twin(name, values)
    sure = routed(name, values)
    assert not tokens or sure.float().mean() > 0.5
    if name == "route":
        atoms_got, weights, signal = got
        assert (atoms_got.dtype, weights.dtype, signal.dtype) == (torch.int32, torch.float32, torch.float32)
        assert torch.equal(atoms_got[sure].sort(dim=1).values.long(), want[0][sure].sort(dim=1).values)
        assert error(weights[sure].sort(dim=1).values, want[1][sure].sort(dim=1).values) < 1e-4
        got, want = signal, want[2]
    else:
        assert got.dtype == dtype
    assert got.shape == want.shape and error(got[sure], want[sure]) < TOLERANCE[dtype]
    assert all(torch.equal(v, was) for v, was in zip((v for v in values if isinstance(v, Tensor)), before, strict=True))


@pytest.mark.parametrize("choice", ["auto", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_registration(name: str, choice: str) -> None:
    ops.use(choice)
    torch.library.opcheck(operator(name).default, arguments(name, torch.float32, 5, 16, 9, 2))
    ops.use("auto")


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.full, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole(name: str, backend: str) -> None:
    first, *rest = arguments(name, torch.float32, 5, 16, 9, 2)

    def compute(first: Tensor) -> Tensor:
        out = operator(name)(first * 2, *rest)
        return (out[1] if name == "route" else out) + 1

    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(compute, backend=backend, fullgraph=True, dynamic=True)
        for batch in (first, first):
            torch.testing.assert_close(compiled(batch), compute(batch))


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_layers_are_packed_once_and_anew_when_a_weight_changes() -> None:
    library.layers.clear()
    values = arguments("dsc_layer", torch.float32, 3, 16, 9, 2)
    once = torch.ops.dsc.dsc_layer(*values)
    assert torch.equal(torch.ops.dsc.dsc_layer(*values), once) and len(library.layers) == 1
    values[2].mul_(2)
    twice = torch.ops.dsc.dsc_layer(*values)
    assert error(twice, reference.dsc_layer(*wide(values))) < 1e-5 and error(twice, once) > 1e-2
    other = arguments("moe_layer", torch.float32, 3, 16, 9, 2)
    torch.ops.dsc.moe_layer(*other)
    assert len(library.layers) == 3
    del values, other
    gc.collect()
    torch.ops.dsc.moe_layer(*arguments("moe_layer", torch.float32, 3, 16, 8, 2))
    assert len(library.layers) == 1, "layers outlive their weights"


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_a_weight_where_another_lay_is_not_taken_for_it() -> None:
    library.layers.clear()
    x, residual, up, gate, down, *rest = arguments("dsc_layer", torch.float32, 3, 16, 9, 2)
    for number in range(8):  # a storage that is freed leaves its place to the next one
        changed = down + number
        got = torch.ops.dsc.dsc_layer(x, residual, up, gate, changed, *rest)
        assert error(got, reference.dsc_layer(*wide((x, residual, up, gate, changed, *rest)))) < 1e-5
        del changed
    assert len(library.layers) == 1, "layers outlive one of their weights"


def test_what_a_layer_is_built_for_decides_who_computes(kernels: str) -> None:
    library.layers.clear()
    torch.ops.dsc.dsc_layer(*arguments("dsc_layer", torch.float32, 3, 16, 9, 2))
    assert len(library.layers) == (0 if kernels == "plain" else 1)
