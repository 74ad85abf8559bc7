"""The plain operators and their reference against the definitions in float64, over odd shapes, ties and strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_parts import ffn_parts, moe_parts
from support.shapes import EPS, TAU, Shape, layer, shapes
from torch import Tensor

from dsc_kernels import native, ops, plain, reference
from dsc_kernels.backend import Backend
from dsc_kernels.weights import MAX_PICKS, AtomBank

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 8e-3}
EMPTY_BATCH = pytest.mark.filterwarnings("ignore:var.{3} degrees of freedom")  # torch warns of a variance of no rows


def selected_by_hand(row: list[float], k: int, tau: float) -> list[int]:
    clamped = [max(-tau, min(tau, value)) for value in row]
    return sorted(range(len(row)), key=lambda j: (-clamped[j], j))[:k]


@settings(max_examples=80, deadline=None)
@given(shape=shapes(), step=st.sampled_from([0.0, 0.25, 2.0]), scale=st.sampled_from([1.0, 30.0]))
def test_select_orders_by_clamped_logit_then_index(shape: Shape, step: float, scale: float) -> None:
    logits = torch.randn(shape.tokens, shape.atoms, generator=shape.generator()) * scale
    if step:
        logits = (logits / step).round() * step  # many equal logits, zeros of both signs among them
    logits = shape.lay(logits)
    values, atoms = plain.select(logits, shape.k, TAU)
    wide_values, wide_atoms = reference.select(logits.double(), shape.k, TAU)
    assert atoms.tolist() == wide_atoms.tolist() == [selected_by_hand(row, shape.k, TAU) for row in logits.tolist()]
    assert torch.equal(values.double(), wide_values)
    assert values.dtype == torch.float32
    assert atoms.dtype == torch.int64


@pytest.mark.parametrize("select", [plain.select, reference.select])
@pytest.mark.parametrize("tau", [0.5, TAU, math.inf])
def test_ties_go_to_the_lowest_index(select: Callable[..., tuple[Tensor, Tensor]], tau: float) -> None:
    bound = min(tau, 1e30)
    rows = {
        "above τ": [bound, 2 * bound, 1.5 * bound, bound, 9 * bound],
        "below −τ": [-3 * bound, -bound, -2 * bound, -bound, -bound],
        "equal": [0.25] * 5,
        "zeros of both signs": [-0.0, 0.0, -0.0, 0.0, -0.0],
    }
    for name, row in rows.items():
        for k in range(1, 6):
            _, atoms = select(torch.tensor([row]), k, tau)
            assert atoms.tolist() == [selected_by_hand(row, k, tau)], name
            if tau < math.inf or name in ("equal", "zeros of both signs"):
                assert atoms.tolist() == [list(range(k))], name


def test_a_logit_beyond_tau_wins_nothing_over_an_earlier_one_at_tau() -> None:
    logits = torch.full((1, 300), -50.0)
    logits[0, [7, 90, 91, 299]] = torch.tensor([TAU, 50.0, 1e30, torch.inf])
    values, atoms = plain.select(logits, 6, TAU)
    assert atoms.tolist() == [[7, 90, 91, 299, 0, 1]]
    assert values.tolist() == [[TAU] * 4 + [-TAU] * 2]


@pytest.mark.parametrize("m", [1, 2, 31, 64, 97, 300])
def test_a_winner_is_found_at_every_position(m: int) -> None:
    background = torch.randn(m, m, generator=torch.Generator().manual_seed(m)).clamp(-3, 3)
    planted = background + 10 * torch.eye(m)
    assert plain.select(planted, 1, TAU)[1].flatten().tolist() == list(range(m))
    pairs = background + 10 * torch.eye(m) + 10 * torch.eye(m).roll(1, dims=1)
    found = plain.select(pairs, min(2, m), TAU)[1].sort(dim=1).values
    assert found.tolist() == [sorted({j, (j + 1) % m}) for j in range(m)]


def test_keys_are_all_different_and_order_like_value_then_falling_index() -> None:
    row = [3.0, -1.5, 3.0, 0.0, -1.5, 1e-40, -1e-40, torch.inf, -torch.inf, 3.4e38, -3.4e38, 0.0]
    keys = plain.order_keys(torch.tensor([row]))[0].tolist()
    assert len(set(keys)) == len(row)
    assert sorted(range(len(row)), key=lambda j: -keys[j]) == sorted(range(len(row)), key=lambda j: (-row[j], j))


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("backend", [plain, native])
def test_rows_that_were_picked_elsewhere_are_composed(backend: Backend, rank: int) -> None:
    g = torch.Generator().manual_seed(rank)
    b, d, m, k = 5, 33, 7, 3
    static, x = torch.randn(b, d, generator=g).bfloat16(), torch.randn(b, d, generator=g).bfloat16()
    u, v = (torch.randn(m * max(rank, 1), d, generator=g).bfloat16() for _ in range(2))
    picked, weights, gamma = torch.randn(b, m, generator=g).argsort(1)[:, :k], torch.rand(b, k), torch.rand(d)
    want = static.double()
    for token, place in itertools.product(range(b), range(k)):
        first = int(picked[token, place]) * max(rank, 1)
        for row in range(first, first + max(rank, 1)):
            latent = (x[token].double() @ u[row].double()) * weights[token, place].double()
            want[token] += latent * v[row].double() * gamma.double()
    got = backend.compose_rows(static, x, picked, weights, AtomBank(u, v, gamma), rank)
    assert got.dtype == x.dtype
    assert torch.linalg.vector_norm(got - want) < ROUNDING[x.dtype] * torch.linalg.vector_norm(want)


@EMPTY_BATCH
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes(),
    norm=st.booleans(),
    biased=st.booleans(),
    tau=st.sampled_from([0.5, TAU]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_dsc_layer_matches_float64(shape: Shape, norm: bool, biased: bool, tau: float, dtype: torch.dtype) -> None:
    g, (b, d, m) = shape.generator(), (shape.tokens, shape.d, shape.atoms)
    x = shape.lay(torch.randn(b, d, generator=g).to(dtype))
    weight = torch.randn(m, d, generator=g, dtype=torch.float64) / d**0.5
    bias = torch.randn(m, generator=g, dtype=torch.float64) if biased else None
    if norm:
        affine = torch.randn(2, d, generator=g, dtype=torch.float64)
        weight, bias = reference.fold_router_norm(weight, bias, affine[0], affine[1])
    norm_eps = 1e-5 if norm else None
    weight32, bias32 = shape.lay(weight.float()), None if bias is None else bias.float()
    u, v = (shape.lay(reference.project(torch.randn(m, d, generator=g), EPS).to(dtype)) for _ in range(2))
    gamma = torch.randn(d, generator=g)
    routed = layer(weight32, bias32, u, v, gamma, shape.k, tau=tau, norm_eps=norm_eps)
    out, atoms, weights, signal = routed.routed(x)
    x32 = x.float().double()
    logits = reference.router_logits(x32, weight32.double(), None if bias32 is None else bias32.double(), norm_eps)
    picked, want_atoms = reference.select(logits, shape.k, tau)
    want_weights, want_signal = reference.coefficients(picked, EPS)
    assert (atoms.dtype, weights.dtype, signal.dtype) == (torch.int64, torch.float32, torch.float32)
    assert all(len(set(row)) == shape.k for row in atoms.tolist())
    torch.testing.assert_close(signal.double(), want_signal, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.double(), want_weights, rtol=1e-4, atol=1e-5)
    ranked = logits.clamp(-tau, tau).sort(dim=1, descending=True).values
    gaps = ranked[:, : shape.k] - torch.cat([ranked, torch.full((b, 1), -torch.inf)], dim=1)[:, 1 : shape.k + 1]
    decided = (gaps > 1e-3).all(dim=1)  # elsewhere rounding may swap neighbours, and either order is right
    assert torch.equal(atoms[decided], want_atoms[decided])
    want = reference.compose(x.double(), atoms, weights.double(), u.double(), v.double(), gamma.double())
    assert out.dtype == dtype
    assert (out.double() - want).norm() <= ROUNDING[dtype] * want.norm() + 1e-12
    assert torch.equal(routed(x), out)
    assert torch.equal(routed(x, x), out + x)


def test_random_routes_are_mostly_decided() -> None:
    """Else the comparison of atoms above would be empty."""
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranked = logits.sort(dim=1, descending=True).values[:, :5]
    assert ((ranked[:, :4] - ranked[:, 1:]) > 1e-3).all(dim=1).float().mean() > 0.9


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), scalar=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_compose_add_matches_float64(shape: Shape, scalar: bool, dtype: torch.dtype) -> None:
    g, (b, d, m, k) = shape.generator(), (shape.tokens, shape.d, shape.atoms, shape.k)
    static, x = (shape.lay(torch.randn(b, d, generator=g).to(dtype)) for _ in range(2))
    u, v = (shape.lay(reference.project(torch.randn(m, d, generator=g), EPS).to(dtype)) for _ in range(2))
    atoms = shape.lay(torch.randn(b, m, generator=g).argsort(dim=1)[:, :k])
    weights, gamma = shape.lay(torch.rand(b, k, generator=g)), torch.randn(1 if scalar else d, generator=g)
    got = plain.compose_add(static, x, atoms, weights, u, v, gamma)
    dynamic = reference.compose(x.double(), atoms, weights.double(), u.double(), v.double(), gamma.double())
    by_hand = torch.zeros_like(dynamic)
    for j in range(k):
        picked = atoms[:, j]
        latent = (x.double() * u.double()[picked]).sum(dim=1) * weights[:, j].double()
        by_hand += latent[:, None] * v.double()[picked] * gamma.double()
    torch.testing.assert_close(dynamic, by_hand, rtol=1e-12, atol=1e-12)
    want = static.double() + dynamic
    assert got.dtype == torch.float32
    assert got.shape == (b, d)
    assert (got.double() - want).norm() <= 1e-6 * (want.norm() + dynamic.norm())


@EMPTY_BATCH
@settings(max_examples=50, deadline=None)
@given(shape=shapes(tokens=40, atoms=12), hidden=st.integers(1, 9), normalize=st.booleans(), gated=st.booleans())
def test_a_mixture_of_experts_is_the_sum_over_each_tokens_own(
    shape: Shape, hidden: int, normalize: bool, gated: bool
) -> None:
    g, (b, d, n) = shape.generator(), (shape.tokens, shape.d, shape.atoms)
    x, router = torch.randn(b, d, generator=g), torch.randn(n, d, generator=g) / d**0.5
    bias = torch.randn(n, generator=g) if gated else None
    up, gate = (list(torch.randn(n, hidden, d, generator=g) / d**0.5) for _ in range(2))
    down = list(torch.randn(n, d, hidden, generator=g) / hidden**0.5)
    activation = "silu" if gated else "gelu"
    options = {"activation": activation, "k": shape.k, "normalize": normalize}
    moe = plain.Moe(**moe_parts(router, bias, up, gate if gated else None, down, **options))
    weights, experts = moe.route(x)
    logits = reference.router_logits(x, router, bias, None)
    assert torch.equal(experts, reference.softmax_top_k(logits, shape.k)[1])
    chances = logits.double().softmax(dim=1).gather(1, experts)
    want_weights = chances / chances.sum(dim=1, keepdim=True) if normalize else chances
    torch.testing.assert_close(weights.double(), want_weights, rtol=1e-5, atol=1e-7)
    want = torch.zeros(b, d, dtype=torch.float64)
    for i in range(b):
        for e, weight in zip(experts[i].tolist(), want_weights[i], strict=True):
            row = x[i].double()
            inner = up[e].double() @ row
            inner = F.silu(gate[e].double() @ row) * inner if gated else F.gelu(inner)
            want[i] += weight * (down[e].double() @ inner)
    got, residual = moe(shape.lay(x)), torch.randn(b, d, generator=g)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moe(shape.lay(x), residual), got + residual, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(shape=shapes(tokens=20, atoms=12), rank=st.integers(1, 4))
def test_a_mixture_of_loras_is_the_softmax_of_the_picked_adapters(shape: Shape, rank: int) -> None:
    g, (b, d, n) = shape.generator(), (shape.tokens, shape.d, shape.atoms)
    x, router = torch.randn(b, d, generator=g), torch.randn(n, d, generator=g) / d**0.5
    a, down = torch.randn(2, n, rank, d, generator=g).unbind()
    loras = layer(router, None, a.flatten(0, 1), down.flatten(0, 1), torch.ones(1), shape.k, rank=rank, tau=math.inf)
    out, adapters, weights, _ = loras.routed(shape.lay(x))
    logits = reference.router_logits(x, router, None, None)
    assert torch.equal(adapters, reference.select(logits, shape.k, math.inf)[1])
    gates = logits.double().gather(1, adapters).softmax(dim=1)
    torch.testing.assert_close(weights.double(), gates, rtol=1e-5, atol=1e-7)
    inner = torch.einsum("bd,bkrd->bkr", x.double(), a.double()[adapters])
    want = torch.einsum("bk,bkr,bkrd->bd", gates, inner, down.double()[adapters])
    terms = torch.einsum("bk,bkr,bkrd->bd", gates, inner.abs(), down.double()[adapters].abs())
    assert (out.double() - want).norm() <= 1e-5 * terms.norm()


@settings(max_examples=40, deadline=None)
@given(shape=shapes(tokens=20, atoms=40), step=st.sampled_from([0.0, 0.5]))
def test_softmax_top_k_is_the_softmax_over_all_not_renormalised(shape: Shape, step: float) -> None:
    logits = torch.randn(shape.tokens, shape.atoms, generator=shape.generator(), dtype=torch.float64)
    if step:
        logits = (logits / step).round() * step
    values, experts = reference.softmax_top_k(shape.lay(logits), shape.k)
    for row, probabilities, picks in zip(logits.tolist(), values.tolist(), experts.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        assert picks == sorted(range(len(row)), key=lambda e: (-row[e], e))[: shape.k]
        assert probabilities == pytest.approx([math.exp(row[e]) / total for e in picks], rel=1e-12)


@EMPTY_BATCH
@settings(max_examples=40, deadline=None)
@given(shape=shapes(), biased=st.booleans(), shift=st.sampled_from([0.0, 3.0]))
def test_folded_router_norm_equals_layer_norm_and_linear(shape: Shape, biased: bool, shift: float) -> None:
    g, (b, d, m) = shape.generator(), (shape.tokens, shape.d, shape.atoms)
    wide = {"generator": g, "dtype": torch.float64}
    x, weight = torch.randn(b, d, **wide) + shift, torch.randn(m, d, **wide) / d**0.5
    norm_weight, norm_bias = torch.randn(d, **wide), torch.randn(d, **wide)
    bias = torch.randn(m, **wide) if biased else None
    folded, folded_bias = reference.fold_router_norm(weight, bias, norm_weight, norm_bias)
    assert folded.sum(dim=1).abs().max() < 1e-12
    got = reference.router_logits(x, folded, folded_bias, 1e-5)
    want = F.linear(F.layer_norm(x, (d,), norm_weight, norm_bias, 1e-5), weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(shape=shapes(atoms=40), zeros=st.integers(1, 40))
def test_zero_atoms_stay_zero_and_add_nothing(shape: Shape, zeros: int) -> None:
    g, (b, d, m) = shape.generator(), (shape.tokens, shape.d, shape.atoms)
    dead = torch.randperm(m, generator=g)[:zeros]
    raw_u, raw_v = torch.randn(2, m, d, generator=g).unbind()
    raw_u[dead] = 0
    u, v = reference.project(raw_u, EPS), reference.project(raw_v, EPS)
    assert not u[dead].any()
    norms = torch.linalg.vector_norm(u, dim=1)
    assert ((norms - 1).abs() < 1e-6).sum() == m - len(dead)
    static, x = torch.randn(2, b, d, generator=g).unbind()
    picks = dead[torch.randint(len(dead), (b, shape.k), generator=g)]
    coefficients, gamma = torch.rand(b, shape.k, generator=g), torch.randn(d, generator=g)
    assert torch.equal(plain.compose_add(static, x, picks, coefficients, u, v, gamma), static)
    assert torch.equal(plain.compose_add(static, x, picks, coefficients, v, u, gamma), static)


def test_a_row_shorter_than_eps_is_not_blown_up() -> None:
    rows = torch.tensor([[0.0, 0.0], [3e-7, 4e-7], [3.0, 4.0]], dtype=torch.float64)
    want = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(reference.project(rows, EPS), want)


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), low=st.sampled_from([-40.0, -5.0, 0.0]), spread=st.sampled_from([0.1, 5.0, 60.0]))
def test_coefficients_sum_to_less_than_one(shape: Shape, low: float, spread: float) -> None:
    logits = low + spread * torch.rand(shape.tokens, shape.atoms, generator=shape.generator(), dtype=torch.float64)
    picked, _ = reference.select(logits, shape.k, TAU)
    weights, signal = reference.coefficients(picked, EPS)
    assert (weights > 0).all()
    assert (weights.sum(dim=1) < 1).all()
    torch.testing.assert_close(signal, picked.exp().log1p().sum(dim=1), rtol=1e-9, atol=1e-9)
    want = picked.exp().log1p() / (signal[:, None] + EPS) * signal[:, None].tanh()
    torch.testing.assert_close(weights, want, rtol=1e-8, atol=1e-12)
    narrow, _ = reference.coefficients(picked.float(), EPS)
    assert (narrow.double().sum(dim=1) <= 1 + 64 * torch.finfo(torch.float32).eps).all()


def test_linear_is_x_times_the_transposed_weight() -> None:
    x, weight, bias = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0], [5.0, -6.0]]), torch.tensor([0.5, -1.0])
    assert plain.Linear(weight)(x).tolist() == [[-5.0, 17.0]]
    assert plain.Linear(weight, bias)(x).tolist() == [[-4.5, 16.0]]
    assert plain.Linear(weight, bias)(x, residual=torch.tensor([[1.0, 2.0]])).tolist() == [[-3.5, 18.0]]
    want = F.silu(torch.tensor([[-4.5, 16.0]], dtype=torch.float64))
    torch.testing.assert_close(plain.Linear(weight, bias)(x, "silu", out_dtype=torch.float64), want, rtol=1e-6, atol=0)
    narrow = plain.Linear(weight.bfloat16())
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    assert narrow(x.bfloat16(), out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_outputs_of_narrow_weights_are_not_rounded(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(rows, 64, generator=g).to(dtype) for rows in (5, plain.WIDE_ROWS + 300))
    bias = torch.randn(len(weight), generator=g).to(dtype)
    head = plain.Linear(weight, bias)
    want = F.linear(x.float(), weight.float(), bias.float())
    got = head(x, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(head.argmax(x), want.argmax(dim=1))


def test_a_nan_logit_ranks_below_every_number() -> None:
    logits = torch.tensor([[math.nan, -50.0, 3.0, math.nan, -math.inf]])
    assert plain.select(logits, 3, TAU)[1].tolist() == [[2, 1, 4]]


@pytest.fixture
def implementation() -> Iterator[Callable[[str], None]]:
    before = native.active() or "plain"
    yield native.use
    native.use(before)


def test_plain_serves_where_native_kernels_do_not(implementation: Callable[[str], None]) -> None:
    """Switched off, in a dtype they do not know, or with more picks than they hold."""
    g = torch.Generator().manual_seed(0)
    m, d = MAX_PICKS + 6, 8
    up, down = torch.randn(3, d, generator=g), torch.randn(d, 3, generator=g)
    router, u, v = (torch.randn(m, d, generator=g) for _ in range(3))

    def build(k: int, dtype: torch.dtype = torch.float32) -> ops.Ffn:
        one, two, r, a, b = (t.to(dtype) for t in (up, down, router, u, v))
        parts = ffn_parts(one, None, two, "gelu", r, None, a, b, torch.ones(d), k=k, tau=TAU, eps=EPS)
        return ops.ffn(**parts)

    for name in ("plain", *native.available()):
        implementation(name)
        kind = plain.Ffn if name == "plain" else native.Ffn
        assert type(build(MAX_PICKS)) is kind
        assert type(build(MAX_PICKS + 1)) is plain.Ffn
        assert type(build(2, torch.float64)) is plain.Ffn
        assert type(ops.linear(up)) is (plain.Linear if name == "plain" else native.Linear)
        x = torch.randn(5, d, generator=torch.Generator().manual_seed(1))
        for k in (2, MAX_PICKS, MAX_PICKS + 1):
            torch.testing.assert_close(build(k)(x), build(k, torch.float64)(x.double()).float(), rtol=1e-4, atol=1e-5)
