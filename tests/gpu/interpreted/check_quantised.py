"""Products with weights of 4 and 8 bits against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import DTYPES, Poisoned, banded, error, poisoned, random
from support.quantised_cases import exact
from support.quantised_cases import quantised as make

from dsc_kernels.gpu import layers, quantised
from dsc_kernels.quantised import Bits
from dsc_kernels.weights import FfnOptions, MlpWeights

WITHIN = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # numbers of levels are rounded to x's dtype


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, quantised)
    yield stand_in
    stand_in.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "kind"), [(16, "minimums"), (32, "centred"), (32, "none")])
@pytest.mark.parametrize(("batch", "n", "d"), [(1, 1, 1), (3, 67, 101), (17, 40, 200), (64, 33, 64)])
def test_product(dtype: torch.dtype, bits: Bits, group: int, kind: str, batch: int, n: int, d: int) -> None:
    g = torch.Generator().manual_seed(batch * d + n)
    weight = make(g, n, d, bits, group, kind, dtype).map(lambda t: banded(t) if t.is_floating_point() else t)
    x = random(g, dtype, batch, d)
    want = exact(x, weight)
    assert (
        error(quantised.multiply(x, weight), want, x.double().abs() @ weight.whole(torch.float64).abs().T)
        < WITHIN[dtype]
    )


@pytest.mark.parametrize("batch", [5, quantised.FEW + 1])
def test_layers_take_quantised_weights(batch: int) -> None:
    g = torch.Generator().manual_seed(batch)
    up, gate, down = make(g, 70, 48, rank=2), make(g, 70, 48, 8), make(g, 48, 70)
    x, bias = random(g, torch.float32, batch, 48), random(g, torch.float32, 70)
    head = layers.Head(up, bias)
    want = exact(x, up) + bias
    assert error(head(x), want) < 1e-5 and error(head(x, out_dtype=torch.float32), want) < 1e-5
    assert torch.equal(head.argmax(x), head(x).argmax(1))
    layer = layers.Ffn(MlpWeights(up, gate, down), FfnOptions(activation="silu"))
    hidden = torch.nn.functional.silu(exact(x, gate)) * exact(x, up)
    assert error(layer(x), hidden @ down.whole(torch.float64).T) < 1e-5


def test_a_token_that_is_no_number_spoils_no_other() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = make(g, 40, 64), random(g, torch.float32, 5, 64)
    clean = quantised.multiply(x, weight)
    x[2, 7] = torch.nan
    got = quantised.multiply(x, weight)
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]]) and bool(got[2].isnan().all())
