"""Quantised blocks of GGUF files as groups of 4 and 8 bits, as far as such groups hold them.

What has a scale of its own for each 32 numbers keeps its values, bit for bit: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL,
of which those of five bits, and IQ4_NL's table of numbers, take eight. K-quants and IQ4_XS multiply two numbers to get
a group's scale and minimum; the products are rounded to float16 here, each by at most 2^-11 of itself or, where it is
below 2^-14, by 2^-25.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES
from torch import Tensor

from dsc_kernels.quantised import Bits
from dsc_serve.model.dequantise import SWAPPED, Kind, fifth_bits, fours, halves, scales_and_minima
from dsc_serve.model.quantised_tensor import QuantisedTensor, packed
from dsc_serve.model.rounding import OutOfRangeError

STEP = 1 << 18  # numbers at a time
IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)

# Of blocks uint8 [n, bytes] the numbers [n, values], and float32 scales and minimums [n, groups].
Parts = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Form:
    """What holds a kind's blocks."""

    bits: Bits
    group: int
    minimum: bool
    exact: bool  # whether with all their bits
    split: Callable[[Tensor], Parts]


def halved(blocks: Tensor, at: int) -> Tensor:
    """The low and then the high halves of 16 bytes of every block: [n, 32]."""
    own = blocks[:, at : at + 16]
    return torch.cat((own & 15, own >> 4), dim=1)


def q4_0(blocks: Tensor) -> Parts:
    scales = halves(blocks, 0)
    return halved(blocks, 2), scales, -8 * scales


def q4_1(blocks: Tensor) -> Parts:
    return halved(blocks, 4), halves(blocks, 0), halves(blocks, 2)


def q5_0(blocks: Tensor) -> Parts:
    return (halved(blocks, 6) | fifth_bits(blocks, 2)).view(torch.int8) - 16, halves(blocks, 0), None


def q5_1(blocks: Tensor) -> Parts:
    return halved(blocks, 8) | fifth_bits(blocks, 4), halves(blocks, 0), halves(blocks, 2)


def q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:].view(torch.int8), halves(blocks, 0), None


def iq4_nl(blocks: Tensor) -> Parts:
    return IQ4[halved(blocks, 2).int()], halves(blocks, 0), None


def iq4_xs(blocks: Tensor) -> Parts:
    high = blocks[:, 2:4].contiguous().view(torch.int16).int()
    upper = high >> torch.arange(0, 16, 2, dtype=torch.int32) & 3
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).flatten(1)
    scales = (low | upper << 4) - 32
    codes = blocks[:, 8:].view(-1, 8, 1, 16)
    numbers = IQ4[torch.cat((codes & 15, codes >> 4), dim=2).int()]
    return numbers.flatten(1), halves(blocks, 0) * scales, None


def q2_k(blocks: Tensor) -> Parts:
    own, twos = blocks[:, :16], blocks[:, 16:80].contiguous().view(-1, 2, 1, 32)
    numbers = torch.cat([twos >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
    return numbers.flatten(1), halves(blocks, 80) * (own & 15), -halves(blocks, 82) * (own >> 4)


def q3_k(blocks: Tensor) -> Parts:
    twos = blocks[:, 32:96].contiguous().view(-1, 2, 1, 32)
    low = torch.cat([twos >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8, 32)
    high = torch.stack([blocks[:, :32] >> bit & 1 for bit in range(8)], dim=1)
    own = blocks[:, 96:104]
    upper = torch.cat([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    sixes = (torch.cat((own & 15, own >> 4), dim=1) | upper << 4).view(torch.int8) - 32
    scales = halves(blocks, 108) * sixes
    return (low | high << 2).flatten(1), scales, -4 * scales


def q4_k(blocks: Tensor) -> Parts:
    scales, minima = scales_and_minima(blocks)
    return fours(blocks[:, 16:].contiguous()).flatten(1), scales[..., 0], -minima[..., 0]


def q5_k(blocks: Tensor) -> Parts:
    scales, minima = scales_and_minima(blocks)
    fifth = (blocks[:, 16:48, None] >> torch.arange(8, dtype=torch.uint8) & 1).transpose(1, 2) << 4
    return (fours(blocks[:, 48:].contiguous()) | fifth).flatten(1), scales[..., 0], -minima[..., 0]


def q6_k(blocks: Tensor) -> Parts:
    low, high = blocks[:, :128].contiguous().view(-1, 2, 1, 64), blocks[:, 128:192].contiguous().view(-1, 2, 1, 32)
    lower = torch.cat((low & 15, low >> 4), dim=2).view(-1, 8, 32)
    upper = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8, 32)
    numbers = (lower | upper << 4).view(torch.int8) - 32
    return numbers.flatten(1), halves(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


FORMS: dict[Kind, Form] = {
    Kind.Q4_0: Form(4, 32, True, True, q4_0),
    Kind.Q4_1: Form(4, 32, True, True, q4_1),
    Kind.Q5_0: Form(8, 32, False, True, q5_0),
    Kind.Q5_1: Form(8, 32, True, True, q5_1),
    Kind.Q8_0: Form(8, 32, False, True, q8_0),
    Kind.IQ4_NL: Form(8, 32, False, True, iq4_nl),
    Kind.IQ4_XS: Form(8, 32, False, False, iq4_xs),
    Kind.Q2_K: Form(4, 16, True, False, q2_k),
    Kind.Q3_K: Form(4, 16, True, False, q3_k),
    Kind.Q4_K: Form(4, 32, True, False, q4_k),
    Kind.Q5_K: Form(8, 32, True, False, q5_k),
    Kind.Q6_K: Form(8, 16, False, False, q6_k),
}


def quantised(content: bytearray, kind: Kind, shape: tuple[int, ...], big: bool = False) -> QuantisedTensor:
    """A tensor of one of FORMS from its bytes, of which there are `stored_bytes`.

    Scales that are not finite are kept, to be found. Raises OutOfRangeError where float16 does not hold one that is.
    """
    form, (values, size) = FORMS[kind], GGML_QUANT_SIZES[kind]
    blocks = torch.frombuffer(content, dtype=torch.uint8).view(-1, size)
    if big:
        for at in SWAPPED[kind]:
            blocks[:, at : at + 2] = blocks[:, at : at + 2].flip(1)
    count, groups = blocks.shape[0], values // form.group
    stored = torch.empty(count, values * form.bits // 8, dtype=torch.uint8 if form.bits == 4 else torch.int8)
    scales = torch.empty(count, groups, dtype=torch.float16)
    minimums = torch.empty_like(scales) if form.minimum else None
    rows = STEP // values
    for start in range(0, count, rows):
        own = slice(start, start + rows)
        numbers, scale, minimum = form.split(blocks[own])
        stored[own] = packed(numbers, form.bits)
        for to, wide in ((scales, scale), (minimums, minimum)):
            if to is not None and wide is not None:
                to[own] = wide
                if bool((to[own].isinf() & wide.isfinite()).any()):
                    raise OutOfRangeError(f"{kind.name} has scales that float16 does not hold")
    *outer, width = shape

    def shaped(part: Tensor, last: int) -> Tensor:
        return part.view(*outer, last)

    return QuantisedTensor(
        shaped(stored, width * form.bits // 8),
        shaped(scales, width // form.group),
        None if minimums is None else shaped(minimums, width // form.group),
        form.bits,
        form.group,
        shape,
    )
