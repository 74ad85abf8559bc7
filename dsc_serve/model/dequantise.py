"""The values of quantised blocks as GGUF files store them: frequent kinds here, in torch, others by the library."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

Kind = GGMLQuantizationType

FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16, Kind.F64: torch.float64}
# What the other byte order swaps in a block: where its numbers of two bytes lie. The library swaps these kinds too.
SWAPPED: dict[Kind, tuple[int, ...]] = {Kind.Q4_0: (0,), Kind.Q8_0: (0,), Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}
STEP = 1 << 18  # values at a time: a call to torch costs as much as ten thousand, and these stay in a cache


class UnknownKindError(ValueError):
    """A kind of block that cannot be read; the text names it."""


def kind_of(number: int) -> Kind:
    """Raises UnknownKindError."""
    try:
        return Kind(number)
    except ValueError:
        raise UnknownKindError(f"type {number}") from None


def stored_bytes(kind: Kind, shape: tuple[int, ...], big: bool = False) -> int:
    """What a tensor takes in a file; big: its numbers' byte order. Raises UnknownKindError for what cannot be read."""
    block, size = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise UnknownKindError(f"{kind.name} in rows of {shape[-1] if shape else 0}")
    if big and kind not in FLOATS and kind not in SWAPPED:
        raise UnknownKindError(f"{kind.name} in big-endian byte order")
    if kind not in FLOATS and kind not in BLOCKS:
        by_library(np.zeros((1, size), dtype=np.uint8), kind)
    return math.prod(shape) // block * size


def by_library(blocks: NDArray[np.uint8], kind: Kind) -> Tensor:
    try:
        return torch.from_numpy(dequantize(blocks, kind)).float()
    except NotImplementedError:
        raise UnknownKindError(kind.name) from None


def dequantised(content: bytearray, kind: Kind, shape: tuple[int, ...], big: bool = False) -> Tensor:
    """float32 [shape] of a tensor's bytes, of which there are `stored_bytes`."""
    if kind in FLOATS:
        dtype = FLOATS[kind]
        if big:
            np.frombuffer(content, dtype=f"u{dtype.itemsize}").byteswap(inplace=True)
        return torch.frombuffer(content, dtype=dtype).view(shape).float()
    values, size = GGML_QUANT_SIZES[kind]
    blocks = torch.frombuffer(content, dtype=torch.uint8).view(-1, size)
    if big:
        for at in SWAPPED[kind]:
            blocks[:, at : at + 2] = blocks[:, at : at + 2].flip(1)
    if kind not in BLOCKS:
        return by_library(blocks.numpy(), kind).view(shape)
    out = torch.empty(blocks.shape[0], values)
    rows = STEP // values
    for start in range(0, blocks.shape[0], rows):
        BLOCKS[kind](blocks[start : start + rows], out[start : start + rows])
    return out.view(shape)


def halves(blocks: Tensor, at: int) -> Tensor:
    """The float16 numbers at an even byte of every block, as float32 [n, 1]."""
    return blocks.view(torch.float16)[:, at // 2 : at // 2 + 1].float()


def nibbles(blocks: Tensor, at: int, out: Tensor) -> None:
    """The low and then the high halves of the 16 bytes at an even byte of every block, as numbers [n, 32]."""
    word, mask = (torch.int16, 0x0F0F) if (at | blocks.shape[1]) % 4 else (torch.int32, 0x0F0F0F0F)
    size = word.itemsize
    packed = blocks.view(word)[:, at // size : (at + 16) // size]
    parts = torch.empty(blocks.shape[0], 2, 16 // size, dtype=word)
    parts[:, 0] = packed
    torch.bitwise_right_shift(packed, 4, out=parts[:, 1])
    out.copy_(parts.bitwise_and_(mask).view(torch.uint8).view(-1, 32))


def fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """What the fifth bits [n, 32], kept together at a byte, add."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.view(-1, 32) << 4


def q4_0(blocks: Tensor, out: Tensor) -> None:
    nibbles(blocks, 2, out)
    out.sub_(8).mul_(halves(blocks, 0))


def q4_1(blocks: Tensor, out: Tensor) -> None:
    nibbles(blocks, 4, out)
    out.mul_(halves(blocks, 0)).add_(halves(blocks, 2))


def q5_0(blocks: Tensor, out: Tensor) -> None:
    nibbles(blocks, 6, out)
    out.add_(fifth_bits(blocks, 2)).sub_(16).mul_(halves(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor) -> None:
    nibbles(blocks, 8, out)
    out.add_(fifth_bits(blocks, 4)).mul_(halves(blocks, 0)).add_(halves(blocks, 2))


def q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), halves(blocks, 0), out=out)


def scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of blocks of 256 in eight parts, what a part's numbers are multiplied by and what is subtracted: [n, 8, 1]."""
    low, mid, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), dim=1)
    minima = torch.cat((mid & 63, (high >> 4) | (mid >> 2 & 48)), dim=1)
    return (halves(blocks, 0) * scales)[..., None], (halves(blocks, 2) * minima)[..., None]


def fours(packed: Tensor) -> Tensor:
    """Bytes [n, 128] as numbers [n, 8, 32]: of every 32 bytes the low and then the high halves."""
    parts = packed.view(-1, 4, 1, 32)
    return torch.cat((parts & 15, parts >> 4), dim=2).view(-1, 8, 32)


def q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = scales_and_minima(blocks)
    torch.mul(fours(blocks[:, 16:].contiguous()), scales, out=out.view(-1, 8, 32)).sub_(minima)


def q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = scales_and_minima(blocks)
    fifth = (blocks[:, 16:48, None] >> torch.arange(8, dtype=torch.uint8) & 1).transpose(1, 2) << 4
    torch.mul(fours(blocks[:, 48:].contiguous()) | fifth, scales, out=out.view(-1, 8, 32)).sub_(minima)


def q6_k(blocks: Tensor, out: Tensor) -> None:
    low, high = blocks[:, :128].contiguous().view(-1, 2, 1, 64), blocks[:, 128:192].contiguous().view(-1, 2, 1, 32)
    fours = torch.cat((low & 15, low >> 4), dim=2).view(-1, 8, 32)
    upper = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8, 32)
    numbers = (fours | upper << 4).view(torch.int8).sub_(32).view(-1, 16, 16)
    scales = halves(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    torch.mul(numbers, scales[..., None], out=out.view(-1, 16, 16))


BLOCKS: dict[Kind, Callable[[Tensor, Tensor], None]] = {
    Kind.Q4_0: q4_0,
    Kind.Q4_1: q4_1,
    Kind.Q5_0: q5_0,
    Kind.Q5_1: q5_1,
    Kind.Q8_0: q8_0,
    Kind.Q4_K: q4_k,
    Kind.Q5_K: q5_k,
    Kind.Q6_K: q6_k,
}
