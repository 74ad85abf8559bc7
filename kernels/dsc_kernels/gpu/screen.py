"""A router in int8 for steps of few tokens, which read it instead of the router itself, and how far off it may be.

A row is held in levels of −127 … 127, each SPAN neighbours of it with a scale. Tokens stay as they are: levels are
exact in every dtype that kernels take, so beside what float32 sums lose a logit is off by what the row has lost, at
most ‖w − ŵ‖ · ‖x‖ (Cauchy and Schwarz), times the norm's 1 / σ where that is folded in. `rescore` scores again whatever
may be picked by these bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.compiler import kernel

SPAN = 128  # columns with one scale: steps of the products of few tokens divide it
GROUP = 16  # atoms of which the largest logit is kept
SCREENED_TOKENS = 32  # of more, the rows that are scored again are most of the router
SMALLEST_STRETCH = 64  # atoms of a program of `rescore`
CHUNK = 1 << 22  # elements that are in float64 at a time
UP = 1 + 1e-5  # for the rounding of norms and of bounds themselves


@dataclass(frozen=True, eq=False)
class Screen:
    """A router [atoms, d] in int8, and what of it that leaves out. `padded`: atoms in whole groups."""

    levels: Tensor  # int8 [atoms, d]
    scales: Tensor  # bfloat16 [⌈d / SPAN⌉, padded]: what 1 is worth
    errors: Tensor  # float32 [padded]: times ‖x‖, the most that a logit is off by; ∞ where that is not known
    counts: Tensor  # int64 [SCREENED_TOKENS, 1 + stretches]: of each place in a step its tokens, and rows scored again

    @property
    def counted(self) -> tuple[int, int]:
        """Rows scored again, and the tokens that this was for, since the layer was made: waits for the device."""
        tokens, rows = torch.stack((self.counts[:, 0].sum(), self.counts[:, 1:].sum())).tolist()
        return int(rows), int(tokens)


def screen(router: Tensor) -> Screen:
    """A router [atoms, d] of any dtype that kernels take; what is bounded is that router."""
    atoms = router.shape[0]
    padding = -atoms % GROUP
    levels, scales, errors = (torch.cat(parts) for parts in zip(*map(rounded, pieces(router)), strict=True))
    return Screen(
        levels.contiguous(),
        torch.nn.functional.pad(scales, (0, 0, 0, padding)).T.contiguous(),
        torch.nn.functional.pad(errors, (0, padding)).contiguous(),
        torch.zeros(SCREENED_TOKENS, 1 + -(-atoms // SMALLEST_STRETCH), dtype=torch.int64, device=router.device),
    )


def pieces(router: Tensor) -> Iterator[Tensor]:
    """So many of its rows at a time."""
    rows = max(1, CHUNK // router.shape[1])
    for start in range(0, router.shape[0], rows):
        yield router[start : start + rows]


def rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of some rows [n, d], scales [n, ⌈d / SPAN⌉], and bounds of what both leave out."""
    n, d = rows.shape
    wide = rows.double()
    spans = torch.nn.functional.pad(wide, (0, -d % SPAN)).view(n, -1, SPAN)
    peaks = spans.abs().amax(dim=2)
    # Other rows are 0 in int8, with all of themselves as their error: of those an exact sum might overflow where that
    # of int8 does not
    bounded = (peaks.amax(dim=1, keepdim=True) < 1e20) & (peaks > 1e-30)
    scales = torch.where(bounded, peaks / 127, 0.0).bfloat16()
    steps = scales.double().unsqueeze(2)
    levels = torch.where(steps > 0, spans / steps, 0.0).round().clamp(-127, 127)
    norm, kept = torch.linalg.vector_norm(wide, dim=1), torch.linalg.vector_norm(levels * steps, dim=(1, 2))
    lost = torch.linalg.vector_norm(spans - levels * steps, dim=(1, 2))
    errors = (lost + float_error(d) * (norm + kept)) * UP + 1e-18
    errors = torch.where(wide.isfinite().all(dim=1), errors, torch.inf).float()
    return levels.view(n, -1)[:, :d].to(torch.int8), scales, errors


def float_error(d: int) -> float:
    """What a float32 sum of d products may lose, relative to the product of both sides' norms.

    Tensor cores add 16 products to a sum at a time, and cut each of these 17 where the largest has its last bit; with
    fused additions it is half as much. What is done with such sums before a logit is stored is a few roundings more.
    """
    return (1.125 * d + 64) * 2.0**-23


@kernel
def levels_by_tokens(
    sums: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    x: tl.tensor,
    token: tl.tensor,
    is_token: tl.tensor,
    padded: tl.tensor,
    d: tl.constexpr,
    span: tl.constexpr,
    d_per_step: tl.constexpr,
) -> tl.tensor:
    """sums [rows, tokens] plus Ŵ[row] · x[token]ᵀ; row and token are int64."""
    step = tl.arange(0, d_per_step)
    rows = levels + row[:, None] * d + step[None, :]
    columns = x + token[None, :] * d + step[:, None]
    for start in range(0, d, d_per_step):
        inside = start + step < d
        rows_tile = tl.load(rows + start, mask=is_row[:, None] & inside[None, :], other=0)
        columns_tile = tl.load(columns + start, mask=is_token[None, :] & inside[:, None], other=0.0)
        worth = tl.load(scales + start // span * padded + row, mask=is_row, other=0.0).to(tl.float32)
        whole = rows_tile.to(tl.float32).to(columns_tile.dtype)
        part = tl.dot(whole, columns_tile, input_precision="ieee")
        sums += part * worth[:, None]
    return sums


@kernel
def largest_error(
    errors: tl.tensor,
    router_bias: tl.tensor,
    rstd: tl.tensor,
    length: tl.tensor,
    atom: tl.tensor,
    is_atom: tl.tensor,
    token: tl.tensor,
    is_token: tl.tensor,
) -> tl.tensor:
    """By how much logits [atoms, tokens] may be off; NaN of tokens too large or too small to be bounded."""
    size = tl.load(length + token, mask=is_token, other=0.0)
    worth = size
    if rstd is not None:
        worth = size * tl.load(rstd + token, mask=is_token, other=0.0)
    known = (size > 1e-10) & (size < 1e15) & (worth > 1e-10) & (worth < 1e15)
    worth = tl.where(known, worth * 1.00001, float("nan"))
    error = tl.load(errors + atom, mask=is_atom, other=0.0)[:, None] * worth[None, :]
    slack = 1e-30
    if router_bias is not None:  # which is added to both, and rounded with them
        slack += tl.abs(tl.load(router_bias + atom, mask=is_atom, other=0.0))[:, None] * 9.5367431640625e-07
    return error + slack
