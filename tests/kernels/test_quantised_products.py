"""Products with weights of 4 and 8 bits against the float64 oracle, on every instruction set that this machine has.

The baseline runs the vector algorithm of AVX512-VNNI, whose one instruction it spells out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.native_cases import CASES, DTYPES, Guarded, random
from support.quantised_cases import ACTIVATION_BITS, bound, clear_of_ties, emulated, exact, quantised

from dsc_kernels import native, ops, plain
from dsc_kernels.quantised import ActivationBits, Bits, QuantisedWeight, Weight

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]
KINDS = ["minimums", "centred", "none"]
FORMATS = [(bits, group, kind) for bits in (4, 8) for group in (16, 32) for kind in KINDS]


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.one_of(st.integers(0, 9), st.integers(10, 64), st.integers(97, 205)),
    n=st.integers(1, 70),
    d=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32]),
    kind=st.sampled_from(KINDS),
    rank=st.sampled_from([0, 0, 1, 5, 32]),
    activation_bits=st.sampled_from(ACTIVATION_BITS),
    dtype=st.sampled_from(DTYPES),
)
def test_products_are_within_half_a_step_of_each_input(
    guarded: Guarded,
    seed: int,
    batch: int,
    n: int,
    d: int,
    bits: Bits,
    group: int,
    kind: str,
    rank: int,
    activation_bits: ActivationBits,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = quantised(g, n, d, bits, group, kind, dtype, rank, activation_bits=activation_bits)
    x = random(g, dtype, batch, d)
    got = native.Linear(weight)(x, out_dtype=torch.float32)
    assert bool(((got.double() - exact(x, weight)).abs() <= bound(x, weight)).all())
    if activation_bits == 8:  # and what is left is rounding alone: the integer products are exact
        clear = clear_of_ties(x)
        atol = 3e-2 if rank and dtype == torch.bfloat16 else 3e-5
        torch.testing.assert_close(got[clear].double(), emulated(x, weight)[clear], rtol=0, atol=atol)
    guarded.check()


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 25, 64])
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize(("bits", "group", "kind"), FORMATS)
def test_every_number_of_tokens_and_format(
    bits: Bits, group: int, kind: str, activation_bits: ActivationBits, batch: int
) -> None:
    g = torch.Generator().manual_seed(batch)
    weight = quantised(g, 67, 96, bits, group, kind, activation_bits=activation_bits)
    x = random(g, torch.float32, batch, 96)
    got = native.Linear(weight)(x)
    assert bool(((got.double() - exact(x, weight)).abs() <= bound(x, weight)).all())


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_comes_out_the_same_in_any_batch(dtype: torch.dtype, activation_bits: ActivationBits) -> None:
    g = torch.Generator().manual_seed(3)
    layer = native.Linear(quantised(g, 50, 64, dtype=dtype, activation_bits=activation_bits))
    x = random(g, dtype, 70, 64)
    whole = layer(x)
    for count in (1, 3, 24, 25):
        assert torch.equal(layer(x[:count]), whole[:count])


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh"])
def test_bias_activation_and_residual(activation: str) -> None:
    g = torch.Generator().manual_seed(4)
    weight = quantised(g, 37, 50, rank=3)
    x, bias, residual = (random(g, torch.float32, *shape) for shape in ((9, 50), (37,), (9, 37)))
    got = native.Linear(weight, bias)(x, activation, residual)  # type: ignore[arg-type]
    sums = native.Linear(weight)(x) + bias
    named = {"gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}
    torch.testing.assert_close(got, named[activation](sums) + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize(("bits", "group", "kind"), FORMATS)
def test_extreme_scales_and_groups_of_zeros(bits: Bits, group: int, kind: str, activation_bits: ActivationBits) -> None:
    g = torch.Generator().manual_seed(5)
    made = quantised(g, 40, 128, bits, group, kind)
    scales = made.scales.clone()
    scales[:, 0], scales[::3, 1], scales[1::3, 1], scales[:, 2] = 0, 2.0**-24, 6.0e4 / 8, -scales[:, 2]
    minimums = None if kind == "none" else (-8 * scales.float()).half() if kind == "centred" else made.minimums
    weight = replace(made, scales=scales, minimums=minimums, activation_bits=activation_bits)
    x = random(g, torch.float32, 6, 128)
    x[0] = 0
    x[1, 32:64] = 0
    x[2] *= 1e25
    x[3] *= 1e-25
    x[4] = x[4].sign() * 127  # the largest sums that there are
    x[5, ::7] = 1e4
    got = native.Linear(weight)(x)
    assert bool(((got.double() - exact(x, weight)).abs() <= bound(x, weight)).all())
    assert bool((got[0] == 0).all())


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("level", [-128, 127, 0])
def test_the_largest_levels_do_not_overflow(level: int, activation_bits: ActivationBits) -> None:
    values, ones, more = torch.full((17, 256), level, dtype=torch.int8), torch.ones(17, 8).half(), activation_bits
    weight = QuantisedWeight(values, ones, None, 8, 32, (17, 256), None, torch.float32, more)
    nibbles = torch.full((17, 128), 255, dtype=torch.uint8)
    low = QuantisedWeight(nibbles, ones, None, 4, 32, (17, 256), None, torch.float32, more)
    for sign in (1, -1):
        x = torch.full((3, 256), 3.0 * sign)
        torch.testing.assert_close(native.Linear(weight)(x), torch.full((3, 17), 3.0 * sign * 256 * level))
        torch.testing.assert_close(native.Linear(low)(x), torch.full((3, 17), 3.0 * sign * 256 * 15))


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_no_number_spoils_no_other(bad: float, activation_bits: ActivationBits) -> None:
    g = torch.Generator().manual_seed(6)
    layer = native.Linear(quantised(g, 30, 64, activation_bits=activation_bits))
    x = random(g, torch.float32, 5, 64)
    clean = layer(x)
    x[2, 40] = bad
    got = layer(x)
    assert not bool(got[2].isfinite().any())
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 4])
def test_the_head_finds_its_largest_logit(rank: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    for bits in (4, 8):
        head = ops.head(quantised(g, 3001, 64, bits, dtype=dtype, rank=rank))
        for batch in (1, 5, 30):
            x = random(g, dtype, batch, 64)
            assert torch.equal(head.argmax(x), head(x, out_dtype=torch.float32).argmax(1))


def test_head_and_embedding_share_their_memory() -> None:
    weight = quantised(torch.Generator().manual_seed(8), 100, 64)
    first, second = native.Linear(weight), native.Head(weight)
    assert first.packed.data_ptr() == second.packed.data_ptr()
    assert first.packed.nbytes == weight.nbytes / 100 * 112


def test_minimums_of_eight_steps_take_no_bytes() -> None:
    g = torch.Generator().manual_seed(9)
    centred, other = (native.Linear(quantised(g, 64, 64, kind=kind)) for kind in ("centred", "minimums"))
    assert (centred.packed.nbytes, other.packed.nbytes) == (64 * 2 * (16 + 2), 64 * 2 * (16 + 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_computes_with_the_numbers_themselves(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(10)
    weight, x = quantised(g, 40, 50, rank=2, dtype=dtype), random(g, dtype, 6, 50)
    got = plain.Linear(weight)(x, out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), exact(x, weight), rtol=1e-5, atol=1e-5)
    rounded = plain.Linear(weight)(x)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), got, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [0, 3])
def test_embeddings_are_rows_of_the_weight(rank: int) -> None:
    weight = quantised(torch.Generator().manual_seed(11), 40, 50, rank=rank)
    ids = torch.tensor([3, 39, 3, 0])
    torch.testing.assert_close(ops.embed(weight, ids), weight.whole()[ids])
    assert torch.equal(ops.embed(torch.eye(3), torch.tensor([2])), torch.tensor([[0.0, 0.0, 1.0]]))


def test_what_does_not_fit_is_refused() -> None:
    g = torch.Generator().manual_seed(12)
    good = quantised(g, 8, 64)
    spoilt = good.scales.clone()
    spoilt[2, 1] = torch.nan
    refused: list[tuple[str, dict[str, object]]] = [
        ("bits is 5", {"bits": 5}),
        ("group is 64; allowed: 16, 32", {"group": 64}),
        ("values is torch.uint8", {"shape": (8, 70)}),
        ("values is torch.int8", {"values": good.values.view(torch.int8)}),
        ("scales is torch.float32", {"scales": good.scales.float()}),
        ("minimums is", {"minimums": good.scales[:, :1]}),
        (r"scales at \[2, 1\] is nan", {"scales": spoilt}),
        ("compensation's left", {"compensation": (torch.zeros(7, 2), torch.zeros(2, 64))}),
        ("compensation's right", {"compensation": (torch.zeros(8, 2), torch.full((2, 64), torch.inf))}),
        ("dtype is torch.int8", {"dtype": torch.int8}),
        ("activation_bits is 4; allowed: 8 and 16", {"activation_bits": 4}),
        ("sizes must be at least 1", {"shape": (0, 64)}),
    ]
    for message, change in refused:
        with pytest.raises(ValueError, match=message):
            replace(good, **change)  # type: ignore[arg-type]
    mixed: list[Weight] = [good, good.dequantise()]
    with pytest.raises(ValueError, match="1 of 2 weights of one kind are quantised"):
        native.packing.packed(*mixed)
