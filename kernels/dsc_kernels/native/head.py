"""The output head: logits, or each token's most likely word without writing them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dsc_kernels.native import dispatch
from dsc_kernels.native.dispatch import threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.layers import Linear
from dsc_kernels.native.screen import MAX_WIDTH, NO_SCREEN, padded_bias, screen
from dsc_kernels.native.tensors import address, check
from dsc_kernels.quantised import Weight

HeadPrecision = Literal["auto", "exact", "int8-certified"]
HEAD_PRECISIONS: tuple[HeadPrecision, ...] = get_args(HeadPrecision)
SCREENED_WORDS = 2048  # from which on screening is faster

_precision: HeadPrecision = "auto"


def use_head(precision: HeadPrecision) -> None:
    """Find the most likely word with the head as it is ("exact"), or screen it in int8 first ("int8-certified").

    Both find the same. "auto" screens where that is faster. A setting of the whole process, for heads made from now on.
    """
    global _precision
    if precision not in HEAD_PRECISIONS:
        raise ValueError(f"head_precision {precision!r} is not known; allowed: {', '.join(HEAD_PRECISIONS)}")
    _precision = precision


def head_precision() -> HeadPrecision:
    """The setting in use, for `use_head` to take again."""
    return _precision


def screens_head(words: int, d: int) -> bool:
    """Whether a head [words, d] is screened."""
    if _precision == "auto":
        return dispatch.active() in dispatch.SCREENING_SETS and words >= SCREENED_WORDS and d <= MAX_WIDTH
    return _precision == "int8-certified"


class Head(Linear):
    """A native head [words, d] with a bias [words] or none.

    Screened, it is also kept in int8: half as many bytes and products per token, and a few panels of 16 words that are
    multiplied again. While these are more than an eighth of all for a thread, it mostly multiplies everything.
    A quantised weight is no larger than a screen of it, so its products are the logits, and no screen is made.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        screened = isinstance(weight, Tensor) and screens_head(self.n, self.d)
        s = self.screen = screen(weight, bias, rows=None) if screened else NO_SCREEN
        self._padded = padded_bias(bias, self.n)
        self._head = kernels.head_layer(
            is_bf16=self._is_bf16,
            w=self.packed.data_ptr(),
            w_format=address(self.format),
            bias=self._padded.data_ptr(),
            d=self.d,
            n=self.n,
            screen_rows=address(s.rows),
            screen_packed=address(s.packed),
            screen_rows_format=0,
            screen_steps=address(s.steps),
            screen_shifts=address(s.shifts),
            screen_errors=address(s.errors),
            screen_norms=address(s.norms),
            screen_slack=s.slack,
            screen_counters=address(s.counters),
            max_error=0.0 if s.errors is None else float(s.errors.max()),
            max_norm=0.0 if s.norms is None else float(s.norms.max()),
        )

    @property
    def screened(self) -> bool:
        """Whether `argmax` screens the weight in int8."""
        return self.screen.counters is not None

    def argmax(self, x: Tensor) -> Tensor:
        """Where each row of x Wᵀ + bias has its largest output, the first of equal ones: x [B, d] → int64 [B]."""
        batch = x.shape[0]
        check("x", x, (batch, self.d), self.dtype)
        out = torch.empty(batch, dtype=torch.int64)
        x = x.contiguous()
        if batch:
            kernels.argmax(self._head, x=x.data_ptr(), out=out.data_ptr(), batch=batch, threads=threads())
        return out
