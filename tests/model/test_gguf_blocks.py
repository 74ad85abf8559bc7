"""Quantised blocks as they are: the library's values, exactly or within what rounding to float16 costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from test_dequantise import random_blocks as blocks_of

from dsc_serve.model.dequantise import SWAPPED, Kind, dequantised
from dsc_serve.model.gguf_blocks import FORMS, quantised
from dsc_serve.model.rounding import OutOfRangeError

SCALES = {Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,), Kind.Q2_K: (80, 82), Kind.Q3_K: (108,)}
RELATIVE, ABSOLUTE = 2.0**-11, 2.0**-25  # of a number that is rounded to float16


def random_blocks(kind: Kind, size: float = 1.0) -> np.ndarray:
    blocks = blocks_of(kind)
    generator = np.random.default_rng(5)
    for at in (*SCALES.get(kind, ()),) if size == 1.0 else (*SCALES.get(kind, ()), *known(kind)):
        scales = (size * generator.normal(size=len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def known(kind: Kind) -> tuple[int, ...]:
    from test_dequantise import SCALES as OTHERS

    return OTHERS.get(kind, ())


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("kind", FORMS)
def test_values_are_the_files(kind: Kind, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.model.gguf_blocks.STEP", 1 << 13)  # several steps, the last one cut short
    blocks, form = random_blocks(kind, size), FORMS[kind]
    shape = (7, 100 * GGML_QUANT_SIZES[kind][0])
    expected = torch.from_numpy(dequantize(blocks, kind)).view(shape)
    found = quantised(bytearray(blocks.tobytes()), kind, shape)
    assert (found.bits, found.group, found.minimums is not None) == (form.bits, form.group, form.minimum)
    assert found.shape == shape and torch.isfinite(expected).all()
    values = found.weight().dequantise()
    assert torch.equal(values, found.dequantised())
    if form.exact:
        assert torch.equal(values, expected)
        return
    levels = found.weight().levels().abs().double()
    scale, minimum = (
        torch.zeros_like(levels) if part is None else part.abs().double().repeat_interleave(form.group, 1)
        for part in (found.scales, found.minimums)
    )
    bound = levels * (1.01 * RELATIVE * scale).clamp_min(ABSOLUTE)
    if found.minimums is not None:
        bound += (1.01 * RELATIVE * minimum).clamp_min(ABSOLUTE)
    error = (values - expected).double().abs()
    assert bool((error <= bound + 1e-6 * expected.abs()).all())  # 1e-6: sums in float32
    assert error.max() > 0  # so that what is called inexact is


@pytest.mark.parametrize("kind", SWAPPED)
def test_the_other_byte_order_gives_the_same(kind: Kind) -> None:
    blocks = random_blocks(kind)
    swapped = blocks.copy()
    for at in SWAPPED[kind]:
        swapped[:, [at, at + 1]] = swapped[:, [at + 1, at]]
    shape = (7, 100 * GGML_QUANT_SIZES[kind][0])
    own, other = (quantised(bytearray(b.tobytes()), kind, shape, big) for b, big in ((blocks, False), (swapped, True)))
    assert torch.equal(own.dequantised(), other.dequantised())


def test_four_bits_take_five_eighths_of_a_byte() -> None:
    shape = (64, 256)
    for kind, bits in ((Kind.Q4_0, 5.0), (Kind.Q4_1, 5.0), (Kind.Q4_K, 5.0), (Kind.Q8_0, 8.5), (Kind.Q6_K, 9.0)):
        count = 64 * 256 // GGML_QUANT_SIZES[kind][0]
        own = quantised(bytearray(random_blocks(kind)[:count].tobytes()), kind, shape)
        assert own.weight().nbytes * 8 == bits * 64 * 256


@pytest.mark.parametrize(("kind", "at"), [(Kind.Q4_0, 0), (Kind.Q4_K, 0), (Kind.Q6_K, 208), (Kind.Q3_K, 108)])
def test_scales_that_float16_does_not_hold_are_told_and_stay_in_floating_point(kind: Kind, at: int) -> None:
    blocks = random_blocks(kind)
    blocks[3, at : at + 2] = np.array([60000], dtype=np.float16).view(np.uint8)
    shape = (7, 100 * GGML_QUANT_SIZES[kind][0])
    content = bytearray(blocks.tobytes())
    with pytest.raises(OutOfRangeError, match=kind.name):
        quantised(content, kind, shape)
    assert torch.isfinite(dequantised(content, kind, shape)).all()


def test_scales_that_are_not_finite_are_kept_to_be_found() -> None:
    blocks = random_blocks(Kind.Q4_1)
    blocks[3, :2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    assert quantised(bytearray(blocks.tobytes()), Kind.Q4_1, (7, 3200)).wrong() == ("scales", 1)
