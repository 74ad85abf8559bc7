"""Certified int8: a router or an output head in int8, with bounds on what that changes in any logit.

A logit of the int8 rows and an int8 token is within `errors[j] · ‖x‖ + norms[j] · ‖x − x̂‖ + slack` of the weight's own
(times the norm's 1 / σ): by Cauchy and Schwarz on both differences, plus what float32 sums may lose. Every row whose
bound says that it may be among the best is scored again from the weight itself, so the result is that of scoring all of
them, whatever the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_kernels.memory import resident

LANES = 16
MAX_WIDTH = (2**31 - 2**26) // (255 * 127)  # beyond it int32 sums could overflow, what outliers add included
CHUNK = 1 << 22  # elements that are in float64 at a time
UP = 1 + 1e-5  # for the rounding of the norms themselves


@dataclass(frozen=True)
class Screen:
    """What `cpu/api.h` calls a Screen. tensors: rows, packed, steps, shifts, errors, norms; none without screening.

    counts: int64 [2], the rows (of a head: panels of 16) that were scored again and the tokens that this was for, since
    the layer was made; a head's are int64 [4], and say then what it stops screening by, for a while.
    """

    tensors: tuple[Tensor | None, ...]
    slack: float
    counts: Tensor | None


NO_SCREEN = Screen((None,) * 6, 0.0, None)


def screen(weight: Tensor, bias: Tensor | None, rows: bool) -> Screen:
    """A weight [n, d], in int8 with bounds, and its bias [n].

    rows: with the weight itself row after row, for those who score rows again.
    """
    d = weight.shape[1]
    if d > MAX_WIDTH:
        raise ValueError(f"an int8-certified weight has d {d}; it may be at most {MAX_WIDTH}")
    pieces = [_rounded(piece) for piece in torch.split(weight, max(1, CHUNK // d))]
    whole, steps, sums, errors, norms = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    slack = 0.0 if bias is None else float(bias.float().nan_to_num(0, 0, 0).abs().max()) * 2.0**-20
    return Screen(
        (
            resident(weight) if rows else None,
            resident(pack_int8(whole)),
            padded(steps),
            padded(128 * sums),
            padded(errors),
            padded(norms),
        ),
        slack + 1e-30,
        torch.zeros(2 if rows else 4, dtype=torch.int64),
    )


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
