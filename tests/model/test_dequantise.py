"""Quantised blocks: the same values, bit for bit, as the library's, in either byte order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

from dsc_serve.model.dequantise import BLOCKS, SWAPPED, Kind, UnknownKindError, dequantised, kind_of, stored_bytes

SCALES = {Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q5_K: (0, 2), **SWAPPED}


def random_blocks(kind: Kind, count: int = 700) -> np.ndarray:
    """Blocks of any bytes, their scales finite."""
    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in SCALES.get(kind, ()):
        scales = generator.normal(size=count).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_equal_the_librarys(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.model.dequantise.STEP", 1 << 13)  # several steps, the last one cut short
    blocks = random_blocks(kind)
    shape = (7, 100 * GGML_QUANT_SIZES[kind][0])
    found = dequantised(bytearray(blocks.tobytes()), kind, shape)
    expected = torch.from_numpy(dequantize(blocks, kind)).view(shape)
    assert torch.isfinite(expected).all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", SWAPPED)
def test_the_other_byte_order_gives_the_same(kind: Kind) -> None:
    blocks = random_blocks(kind)
    swapped = blocks.copy()
    for at in SCALES[kind]:
        swapped[:, [at, at + 1]] = swapped[:, [at + 1, at]]
    shape = (7, 100 * GGML_QUANT_SIZES[kind][0])
    found = dequantised(bytearray(swapped.tobytes()), kind, shape, big=True)
    assert torch.equal(found, torch.from_numpy(dequantize(blocks, kind)).view(shape))


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F32, ">f4"), (Kind.F16, ">f2"), (Kind.F64, ">f8")])
def test_floats_in_the_other_byte_order_are_read(kind: Kind, dtype: str) -> None:
    values = np.linspace(-2, 3, 12).astype(dtype)
    found = dequantised(bytearray(values.tobytes()), kind, (3, 4), big=True)
    assert found.flatten().tolist() == values.astype(np.float32).tolist()


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(UnknownKindError, match="type 999"):
        kind_of(999)
    with pytest.raises(UnknownKindError, match="Q4_1 in big-endian"):
        stored_bytes(Kind.Q4_1, (1, 32), big=True)
    with pytest.raises(UnknownKindError, match="Q8_K"):
        stored_bytes(Kind.Q8_K, (1, 256))
    with pytest.raises(UnknownKindError, match="Q4_1 in rows of 31"):
        stored_bytes(Kind.Q4_1, (2, 31))
