"""Certified int8: a router or an output head in int8, with bounds on what that changes in any logit.

A logit of the int8 rows and an int8 token is within `errors[j] · ‖x‖ + norms[j] · ‖x − x̂‖ + slack` of the weight's own
(times the norm's 1 / σ): by Cauchy and Schwarz on both differences, plus what float32 sums may lose. Every row whose
bound says that it may be among the best is scored again from the weight itself, so the result is that of scoring all of
them, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_kernels.memory import resident
from dsc_kernels.native.extension import kernels
from dsc_kernels.quantised import Weight

LANES = 16
MAX_WIDTH = (2**31 - 2**26) // (255 * 127)  # beyond it int32 sums could overflow, what outliers add included
CHUNK = 1 << 22  # elements that are in float64 at a time
SLACK, TINY = 2.0**-20, 1e-30  # of a bias: what adding it may round
UP = 1 + 1e-5  # for the rounding of the norms themselves


@dataclass(frozen=True, eq=False, kw_only=True)
class Screen:
    """A weight [n, d] in int8, and how far from it that is: what `cpu/api.h` calls a Screen."""

    rows: Tensor | None = None  # the weight itself, for those who score rows again
    rows_format: Tensor | None = None  # of these where they are quantised, with the scales that it points to
    scales: tuple[Tensor, ...] = ()
    packed: Tensor | None = None  # int8, in panels of 16 rows; None: nothing is screened
    steps: Tensor | None = None  # float32 [panels · 16], as all below: what 1 in int8 is worth
    shifts: Tensor | None = None  # int32: 128 · the row's sum
    errors: Tensor | None = None  # norms of what int8 leaves out of a row
    norms: Tensor | None = None  # norms of what it keeps
    slack: float = 0.0  # of the bias and the last additions
    counters: Tensor | None = None  # int64, as `_native.SCREEN_COUNTERS` names them

    def count(self, name: str) -> int:
        """One of the counters since the layer was made; 0 where nothing is screened."""
        return 0 if self.counters is None else int(self.counters[kernels.SCREEN_COUNTERS.index(name)])


NO_SCREEN = Screen()


@dataclass(frozen=True, eq=False)
class ScreenedRows:
    """Rows that are read by their number."""

    values: Tensor | None = None
    format: Tensor | None = None  # int64, `RowFormat` of cpu/api.h; None: not quantised
    scales: tuple[Tensor, ...] = ()  # that the format points to


def screen(weight: Weight, bias: Tensor | None, rows: ScreenedRows | None) -> Screen:
    """A weight [n, d], in int8 with bounds, and its bias [n]. What is bounded is the weight that is served.

    rows: the weight itself row after row, for those who score rows again.
    """
    d = weight.shape[1]
    if d > MAX_WIDTH:
        raise ValueError(f"an int8-certified weight has d {d}; it may be at most {MAX_WIDTH}")
    pieces = [_rounded(piece) for piece in _pieces(weight, max(1, CHUNK // d))]
    whole, steps, sums, errors, norms = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    slack = 0.0 if bias is None else float(bias.float().nan_to_num(0, 0, 0).abs().max()) * SLACK
    own = ScreenedRows() if rows is None else rows
    return Screen(
        rows=own.values,
        rows_format=own.format,
        scales=own.scales,
        packed=resident(pack_int8(whole)),
        steps=padded(steps),
        shifts=padded(128 * sums),
        errors=padded(errors),
        norms=padded(norms),
        slack=slack + TINY,
        counters=torch.zeros(len(kernels.SCREEN_COUNTERS), dtype=torch.int64),
    )


def _pieces(weight: Weight, rows: int) -> Iterator[Tensor]:
    """So many of its rows at a time, as the numbers that they stand for."""
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield weight[part] if isinstance(weight, Tensor) else weight.rows(part).dequantise()


def _rounded(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows in int8, their steps, the sums of their int8, bounds of what is lost, and norms of what is left."""
    d = weight.shape[1]
    wide = weight.double()
    peaks = wide.abs().amax(dim=1)
    # Other rows stay 0 in int8, with all of themselves as their error: tiny ones, and those of which an exact sum over
    # an input that is bounded too (quantise.h: its norm is below 1e15) might overflow where the int8 one does not.
    bounded = (peaks > 1e-30) & (peaks < 1e20)
    steps = torch.where(bounded, peaks / 127, 0.0).float()
    scale = steps.double().unsqueeze(1)
    whole = torch.where(scale > 0, wide / scale, 0.0).round().clamp(-127, 127)
    lost = torch.linalg.vector_norm(wide - whole * scale, dim=1)
    sums = 2 * (d + 64) * 2.0**-24 * torch.linalg.vector_norm(wide, dim=1)
    errors = torch.where(peaks.isfinite(), (lost + sums) * UP + 1e-20, torch.inf)
    norms = torch.linalg.vector_norm(whole * scale, dim=1) * UP
    return whole.to(torch.int8), steps, whole.sum(1).to(torch.int32), errors.float(), norms.float()


def padded_bias(bias: Tensor | None, size: int) -> Tensor:
    """float32 [panels · 16]: the bias or zeros, and −∞ behind the last of `size` outputs."""
    own = torch.zeros(size) if bias is None else bias.float()
    return padded(own, -torch.inf)


def padded(values: Tensor, fill: float = 0) -> Tensor:
    """[atoms] → [panels · 16]."""
    return torch.nn.functional.pad(values, (0, -values.shape[0] % LANES), value=fill)


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [n, d] → panels of 16 outputs [⌈n / 16⌉, ⌈d / 4⌉, 16, 4]."""
    n, d = weight.shape
    whole = torch.nn.functional.pad(weight, (0, -d % 4, 0, -n % LANES))
    return whole.view(-1, LANES, whole.shape[1] // 4, 4).transpose(1, 2).contiguous()
