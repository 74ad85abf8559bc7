"""Drawn shapes of DSC layers, for property tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dsc_kernels import plain
from support.layer_parts import ffn_parts

EPS, TAU = 1e-6, 20.0
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t.contiguous(),
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda t: F.pad(t, (3, 2, 1, 0))[1:, 3:-2],
}


@dataclass(frozen=True)
class Shape:
    """B tokens, d width, M atoms, K atoms per token; the values come from the seed."""

    tokens: int
    d: int
    atoms: int
    k: int
    seed: int
    layout: str

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def lay(self, tensor: Tensor) -> Tensor:
        """The same values, laid out in memory as this example asks."""
        laid = LAYOUTS[self.layout](tensor)
        assert torch.equal(laid, tensor)
        return laid


@st.composite
def shapes(draw: st.DrawFn, tokens: int = 70, atoms: int = 300) -> Shape:
    m = draw(st.integers(1, atoms))
    return Shape(
        tokens=draw(st.integers(0, tokens)),
        d=draw(st.integers(1, 97)),
        atoms=m,
        k=draw(st.integers(1, min(64, m))),
        seed=draw(st.integers(0, 2**32)),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
    )


def layer(
    router: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, gamma: Tensor, k: int, **changes: Any
) -> plain.Ffn:
    """A DSC layer whose static part is zero, in u's dtype."""
    none = torch.zeros(1, u.shape[1], dtype=u.dtype)
    fields = {"k": k, "tau": TAU, "eps": EPS, **changes}
    return plain.Ffn(**ffn_parts(none, None, none.T, "gelu", router, bias, u, v, gamma, **fields))
