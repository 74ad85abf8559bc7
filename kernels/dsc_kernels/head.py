"""The output head: logits, or each token's likeliest word without writing them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.screen import MAX_WIDTH, NO_SCREEN, padded_bias, screen

HeadPrecision = Literal["auto", "exact", "int8-certified"]
HEAD_PRECISIONS: tuple[HeadPrecision, ...] = get_args(HeadPrecision)
SCREENED_WORDS = 2048  # from which on screening is faster

_precision: HeadPrecision = "auto"


def use(precision: HeadPrecision) -> None:
    """Find the likeliest word with the head as it is ("exact"), or screen it in int8 first ("int8-certified").

    Both find the same. "auto" screens where that is faster. A setting of the whole process, for heads made from now on.
    """
    global _precision
    if precision not in HEAD_PRECISIONS:
        raise ValueError(f"head_precision {precision!r} is not known; allowed: {', '.join(HEAD_PRECISIONS)}")
    _precision = precision


def precision() -> HeadPrecision:
    """The setting in use, for `use` to take again."""
    return _precision


def screens(words: int, d: int) -> bool:
    """Whether a head [words, d] is screened."""
    if _precision == "auto":
        return native.active() in native.SCREENING_SETS and words >= SCREENED_WORDS and d <= MAX_WIDTH
    return _precision == "int8-certified"


class Head(native.Linear):
    """A native head [words, d] with a bias [words] or none.

    Screened, it is also kept in int8: half as many bytes and products per token, and a few panels of 16 words that are
    multiplied again. While these are more than an eighth of all for a thread, it mostly multiplies everything.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.screen = screen(weight, bias, rows=False) if screens(self.n, self.d) else NO_SCREEN
        self._padded = padded_bias(bias, self.n)
        self._kept = self.packed, self._padded, self.screen
        *_, errors, norms = self.screen.tensors
        largest = (0.0 if bounds is None else float(bounds.max()) for bounds in (errors, norms))
        tensors = (native.address(tensor) for tensor in self.screen.tensors)
        self._head = native.module().head_layer(
            *(self._half, self.packed.data_ptr(), self._padded.data_ptr(), self.d, self.n, *tensors),
            *(self.screen.slack, native.address(self.screen.counts), *largest),
        )

    def largest(self, x: Tensor) -> Tensor:
        """Where each row of x Wᵀ + bias has its largest output, the first of equal ones: x [B, d] → int64 [B]."""
        batch = x.shape[0]
        native.check("x", x, (batch, self.d), self.dtype)
        out = torch.empty(batch, dtype=torch.int64)
        x = x.contiguous()
        if batch:
            native.module().largest(self._head, x.data_ptr(), out.data_ptr(), batch, native.threads())
        return out
