"""The bounds that come with a DSC layer hold for every token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shapes import EPS, TAU, Shape, layer, shapes
from torch import Tensor

from dsc_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Composition:
    """One token's composition in float64, as a layer picked it."""

    x: Tensor
    picked_u: Tensor
    picked_v: Tensor
    coefficients: Tensor
    signal: Tensor
    gamma: Tensor

    @property
    def delta(self) -> Tensor:
        """ΔW [d, d] itself: Σ_j ẑ_j γ ⊙ v_j u_jᵀ."""
        return torch.einsum("k,ki,kj->ij", self.coefficients, self.picked_v * self.gamma, self.picked_u)


def compositions(shape: Shape, aligned: bool) -> list[Composition]:
    g, (b, d, m) = shape.generator(), (shape.tokens, shape.d, shape.atoms)
    x, gamma = torch.randn(b, d, generator=g), torch.randn(d, generator=g)
    if aligned:  # the worst bank there is: every atom the same, along the largest γ
        u = F.one_hot(gamma.abs().argmax(), d).float().expand(m, d)
        v = u
    else:
        u, v = (reference.project(torch.randn(m, d, generator=g), EPS) for _ in range(2))
    router, bias = torch.randn(m, d, generator=g), torch.randn(m, generator=g)
    _, atoms, coefficients, _ = layer(router, bias, u, v, gamma, shape.k).routed(x)
    logits = reference.router_logits(x.double(), router.double(), bias.double(), None)
    coefficients, signal = reference.coefficients(logits.clamp(-TAU, TAU).gather(1, atoms), EPS)
    u, v = u.double(), v.double()
    u, v = (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1.0) for rows in (u, v))
    return [
        Composition(x[i].double(), u[atoms[i]], v[atoms[i]], coefficients[i], signal[i], gamma.double())
        for i in range(b)
    ]


@settings(max_examples=30, deadline=None)
@given(shape=shapes(tokens=3), aligned=st.booleans())
def test_the_certificate_bounds_the_operator_norm_of_every_token(shape: Shape, aligned: bool) -> None:
    for c in compositions(shape, aligned):
        norm = torch.linalg.matrix_norm(c.delta, ord=2)
        bound = torch.tanh(c.signal) * c.gamma.abs().max()
        assert norm <= bound * (1 + 1e-12)
        if aligned:
            assert norm == pytest.approx(c.coefficients.sum() * c.gamma.abs().max()), (
                "this bank comes as near as ε lets it"
            )
        by_delta = c.delta @ c.x
        atoms = torch.arange(len(c.coefficients))[None]
        dynamic = reference.compose(c.x[None], atoms, c.coefficients[None], c.picked_u, c.picked_v, c.gamma)[0]
        torch.testing.assert_close(dynamic, by_delta, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(shape=shapes(tokens=3), aligned=st.booleans())
def test_leaving_one_atom_out_changes_no_more_than_its_bound(shape: Shape, aligned: bool) -> None:
    for c in compositions(shape, aligned):
        largest = c.gamma.abs().max()
        atoms = torch.arange(len(c.coefficients))[None]
        whole = reference.compose(c.x[None], atoms, c.coefficients[None], c.picked_u, c.picked_v, c.gamma)
        for j in range(len(c.coefficients)):
            without = c.coefficients.clone()
            without[j] = 0
            rest = reference.compose(c.x[None], atoms, without[None], c.picked_u, c.picked_v, c.gamma)
            bound = c.coefficients[j] * (c.x @ c.picked_u[j]).abs() * largest
            assert (whole - rest).norm() <= bound + 1e-12 * whole.norm()
            assert bound <= c.coefficients[j] * c.x.norm() * largest * (1 + 1e-12)
