"""The C++ kernels against the float64 oracle, on every instruction set that this machine has.

Outputs are poisoned with NaN and lie between guard bands, so that what is not written and what is written too much both
show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsc_kernels import native, plain, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

GUARD = 64
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
CASES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=native.available() or ["none"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use("auto")


class Guarded:
    """Stands in for `torch` inside `native`: every tensor it makes is poisoned and has guard bands."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        poison = 0x7BADBAD if dtype == torch.int32 else float("nan")
        buffer = torch.full((size + 2 * GUARD,), poison, dtype=dtype)
        buffer[:GUARD] = buffer[GUARD + size :] = 77
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert bool((buffer[:GUARD] == 77).all()) and bool((buffer[-GUARD:] == 77).all()), "wrote out of bounds"


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    guard = Guarded()
    names = {name: getattr(torch, name) for name in ("float32", "bfloat16", "get_num_threads", "int32", "int64")}
    monkeypatch.setattr(native, "torch", SimpleNamespace(**names, empty=guard.empty))
    yield guard
    guard.check()


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Error of the whole by norm, relative to `scale` (by default the result); NaN counts as infinite.

    Where terms cancel, `scale` is what the result would be if all had one sign: rounding errors are relative to that.
    """
    size = (want if scale is None else scale).double().norm().clamp_min(1e-30)
    return float(((got.double() - want.double()).norm() / size).nan_to_num(torch.inf))


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.one_of(st.integers(0, 14), st.integers(126, 300)),
    d=st.integers(1, 70),
    n=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["none", "gelu", "silu"]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_linear(
    guarded: Guarded,
    seed: int,
    batch: int,
    d: int,
    n: int,
    dtype: torch.dtype,
    activation: native.Activation,
    options: tuple[bool, bool, bool],
) -> None:
    with_bias, with_residual, wide = options
    g = torch.Generator().manual_seed(seed)
    x, w = random(g, dtype, batch, 2 * d)[:, ::2], random(g, dtype, n, d)  # x is not contiguous
    bias = random(g, torch.float32, n) if with_bias else None
    out_dtype = torch.float32 if wide else dtype
    residual = random(g, out_dtype, batch, n) if with_residual else None
    got = native.Linear(w, bias)(x, activation, residual, out_dtype)
    want = x.double() @ w.double().T + (0 if bias is None else bias.double())
    want = plain.ACTIVATIONS[activation](want) + (0 if residual is None else residual.double())
    assert got.dtype == out_dtype
    scale = x.double().abs() @ w.double().abs().T + sum(t.double().abs() for t in (bias, residual) if t is not None)
    assert batch == 0 or error(got, want, scale) < TOLERANCE[dtype]


def routed_layer(
    g: torch.Generator, dtype: torch.dtype, d: int, atoms: int, k: int, hidden: int, **changes: Any
) -> Any:
    """The arguments of a DSC layer, for native.Ffn and for the oracle."""
    gated = changes.pop("gated", False)
    weights = {
        "up": random(g, dtype, hidden, d, scale=d**-0.5),
        "gate": random(g, dtype, hidden, d, scale=d**-0.5) if gated else None,
        "down": random(g, dtype, d, hidden, scale=hidden**-0.5),
        "activation": "gelu",
        "router": random(g, dtype, atoms, d, scale=d**-0.5),
        "router_bias": random(g, torch.float32, atoms, scale=0.3),
        "u": reference.project(random(g, torch.float32, atoms, d), 1e-6).to(dtype),
        "v": reference.project(random(g, torch.float32, atoms, d), 1e-6).to(dtype),
        "gamma": torch.rand(d, generator=g),
        "k": k,
        "tau": 20.0,
        "eps": 1e-6,
        "norm_eps": 1e-5,
    }
    return {**weights, **changes}


def oracle(layer: dict[str, Any], x: Tensor, picks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, picks, coefficients, signal and the margin of the selection, in float64; `picks` overrules selection."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in layer.items()}
    x = x.double()
    logits = reference.router_logits(x, wide["router"], wide["router_bias"], wide["norm_eps"])
    values, atoms = reference.select(logits, layer["k"], layer["tau"])
    if picks is not None:
        atoms = picks
        values = logits.clamp(-layer["tau"], layer["tau"]).gather(1, picks)
    weights, signal = reference.coefficients(values, layer["eps"])
    up = x @ wide["up"].T
    hidden = F.gelu(up) if wide["gate"] is None else F.gelu(x @ wide["gate"].T) * up
    out = hidden @ wide["down"].T + reference.compose(x, atoms, weights, wide["u"], wide["v"], wide["gamma"])
    return out, atoms, weights, signal


def margins(layer: dict[str, Any], x: Tensor) -> Tensor:
    """Per token, how far the k-th logit is from the next."""
    logits = reference.router_logits(
        x.double(), layer["router"].double(), layer["router_bias"].double(), layer["norm_eps"]
    )
    ordered = logits.clamp(-layer["tau"], layer["tau"]).sort(dim=1, descending=True).values
    k = layer["k"]
    return ordered[:, k - 1] - ordered[:, k] if k < ordered.shape[1] else torch.full((x.shape[0],), torch.inf)


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.one_of(st.integers(0, 9), st.integers(127, 290)),
    d=st.integers(1, 67),
    atoms=st.integers(1, 150),
    k=st.integers(1, 64),
    hidden=st.integers(1, 50),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_dsc_layer(
    guarded: Guarded,
    seed: int,
    batch: int,
    d: int,
    atoms: int,
    k: int,
    hidden: int,
    gated: bool,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    layer = routed_layer(g, dtype, d, atoms, min(k, atoms), hidden, gated=gated)
    x = random(g, dtype, batch, d)
    out, picks, weights, signal = native.Ffn(**layer).routed(x)
    if not batch:
        return
    _, atoms_wanted, _, _ = oracle(layer, x)
    sure = margins(layer, x) > 1e-3
    same = (picks.long().sort(dim=1).values == atoms_wanted.sort(dim=1).values).all(dim=1)
    assert bool(same[sure].all())
    want, _, want_weights, want_signal = oracle(layer, x, picks.long())
    wide = {name: layer[name].double().abs() for name in ("up", "gate", "down") if layer[name] is not None}
    hidden_scale = (x.double().abs() @ wide["up"].T) * (x.double().abs() @ wide["gate"].T if gated else 1)
    assert error(out, want, hidden_scale @ wide["down"].T + want.abs()) < TOLERANCE[dtype]
    assert error(weights, want_weights) < 1e-3
    assert error(signal, want_signal) < 1e-3
    assert torch.equal(out, native.Ffn(**layer)(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_added_in_the_same_call(guarded: Guarded, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    layer = routed_layer(g, dtype, 48, 70, 4, 33)
    x, residual = random(g, dtype, 5, 48), random(g, dtype, 5, 48, scale=3)
    got = native.Ffn(**layer)(x, residual)
    assert error(got, oracle(layer, x)[0] + residual.double()) < TOLERANCE[dtype]


def selection_layer(logits: Tensor, k: int, tau: float) -> native.Ffn:
    """A layer whose router's logits for the input [1.0] are the given ones."""
    zero = torch.zeros(logits.numel(), 1)
    return native.Ffn(
        up=torch.zeros(1, 1),
        gate=None,
        down=torch.zeros(1, 1),
        activation="none",
        router=zero,
        router_bias=logits,
        u=zero,
        v=zero,
        gamma=torch.ones(1),
        k=k,
        tau=tau,
        eps=1e-6,
    )


@CASES
@given(
    values=st.lists(st.sampled_from([-25.0, -20.0, -3.0, -0.0, 0.0, 1.5, 19.0, 20.0, 40.0]), min_size=1, max_size=90),
    k=st.integers(1, 64),
)
def test_ties_go_to_the_lowest_index_also_at_tau(guarded: Guarded, values: list[float], k: int) -> None:
    logits = torch.tensor(values)
    k = min(k, len(values))
    _, picks, _, _ = selection_layer(logits, k, 20.0).routed(torch.ones(1, 1))
    assert torch.equal(picks[0].long(), reference.select(logits[None].double(), k, 20.0)[1][0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_winners_are_found_wherever_they_are(guarded: Guarded, k: int) -> None:
    for place in range(100):
        logits = torch.linspace(-1, 1, 100).flip(0)
        winners = [(place + 7 * j) % 100 for j in range(k)]
        for rank, at in enumerate(winners):
            logits[at] = 10.0 - rank
        _, picks, _, _ = selection_layer(logits, k, 20.0).routed(torch.ones(1, 1))
        assert picks[0].tolist() == winners


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [5, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_numbers_touch_no_other_token(guarded: Guarded, value: float, batch: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    layer = native.Ffn(**routed_layer(g, dtype, 48, 70, 4, 33))
    moe = moe_layer(g, dtype, 48, 20, 5, 2)
    x = random(g, dtype, batch, 48)
    clean, clean_moe = layer(x), native.Moe(**moe)(x)
    x[2, 7] = value
    others = [i for i in range(batch) if i != 2]
    got, picks, _, _ = layer.routed(x)
    assert torch.equal(got[others], clean[others])
    assert bool(((picks >= 0) & (picks < 70)).all())
    assert not bool(torch.isfinite(got[2]).all())
    assert torch.equal(native.Moe(**moe)(x)[others], clean_moe[others])


def test_a_nan_logit_ranks_below_every_number(guarded: Guarded) -> None:
    logits = torch.tensor([float("nan"), -5.0, float("nan"), 3.0, 2.0] + [-9.0] * 40)
    _, picks, weights, _ = selection_layer(logits, 3, 20.0).routed(torch.ones(1, 1))
    assert picks[0].tolist() == [3, 4, 1]
    assert bool(torch.isfinite(weights).all())


def test_zero_atoms_add_nothing(guarded: Guarded) -> None:
    g = torch.Generator().manual_seed(5)
    layer = routed_layer(g, torch.float32, 48, 30, 4, 33)
    layer["v"] = torch.zeros(30, 48)
    x = random(g, torch.float32, 4, 48)
    static = native.Ffn(layer["up"], None, layer["down"], "gelu")
    torch.testing.assert_close(native.Ffn(**layer)(x), static(x), atol=0, rtol=0)


def moe_layer(g: torch.Generator, dtype: torch.dtype, d: int, hidden: int, experts: int, k: int) -> dict[str, Any]:
    return {
        "router": random(g, dtype, experts, d, scale=d**-0.5),
        "router_bias": random(g, torch.float32, experts, scale=0.3),
        "up": [random(g, dtype, hidden, d, scale=d**-0.5) for _ in range(experts)],
        "gate": None,
        "down": [random(g, dtype, d, hidden, scale=hidden**-0.5) for _ in range(experts)],
        "activation": "gelu",
        "k": k,
        "normalize": False,
        "norm_eps": 1e-5,
    }


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.one_of(st.integers(0, 9), st.integers(127, 400)),
    d=st.integers(3, 67),
    hidden=st.integers(1, 40),
    experts=st.integers(1, 9),
    k=st.integers(1, 4),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_moe_layer(
    guarded: Guarded,
    seed: int,
    batch: int,
    d: int,
    hidden: int,
    experts: int,
    k: int,
    options: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> None:
    gated, normalize, with_residual = options
    g = torch.Generator().manual_seed(seed)
    k = min(k, experts)
    layer = {**moe_layer(g, dtype, d, hidden, experts, k), "normalize": normalize}
    if gated:
        layer["gate"] = [random(g, dtype, hidden, d, scale=d**-0.5) for _ in range(experts)]
    x = random(g, dtype, batch, d)
    residual = random(g, dtype, batch, d) if with_residual else None
    got = native.Moe(**layer)(x, residual)
    if not batch:
        return
    wide = {n: [w.double() for w in layer[n]] for n in ("up", "down")}
    gates = None if not gated else [w.double() for w in layer["gate"]]
    bias = layer["router_bias"].double()
    oracle = plain.Moe(layer["router"], None, wide["up"], gates, wide["down"], "gelu", k, normalize, 1e-5)
    logits = reference.router_logits(x.double(), layer["router"].double(), bias, 1e-5)
    weights, picks = reference.softmax_top_k(logits, k)
    ordered = logits.sort(dim=1, descending=True).values
    sure = ordered[:, k - 1] - ordered[:, k] > 1e-3 if k < experts else torch.ones(batch, dtype=torch.bool)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    want = torch.zeros(batch, d, dtype=torch.float64) if residual is None else residual.double()
    scale = want.abs()
    for token in range(batch):
        for weight, expert in zip(weights[token], picks[token].tolist(), strict=True):
            output = oracle.experts[expert](x[token : token + 1].double())[0]
            want[token] += weight * output
            scale[token] += weight * output.norm()
    # a token whose values are nearly equal has its rounding errors multiplied by the router's norm
    assert not bool(sure.any()) or error(got[sure], want[sure], scale[sure]) < max(TOLERANCE[dtype], 3e-4)


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 7),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([16, 20, 24, 64, 80, 128]),
    block=st.integers(1, 17),
    longest=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_decode_attention(
    guarded: Guarded,
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    size: int,
    block: int,
    longest: int,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    width = -(-longest // block)
    blocks = batch * width + 3
    keys, values = (random(g, dtype, blocks, kv_heads, block, size) for _ in range(2))
    tables = torch.randperm(blocks, generator=g)[: batch * width].view(batch, width)
    contexts = torch.randint(1, longest + 1, (batch,), generator=g)
    q = random(g, dtype, batch, kv_heads * group + 2 * kv_heads, size)[:, : kv_heads * group]  # a slice of q, k, v
    got = native.decode_attention(q, keys, values, tables, contexts, longest, size**-0.5)
    for row in range(batch):
        k, v = (plain.gather_context(p, tables[row : row + 1], int(contexts[row]))[0].double() for p in (keys, values))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q[row].double()[:, None] @ k.transpose(1, 2)) * size**-0.5
        assert error(got[row], (scores.softmax(-1) @ v)[:, 0]) < TOLERANCE[dtype]


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.one_of(st.integers(0, 5), st.just(300)),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    size=st.sampled_from([16, 20, 64, 80]),
    block=st.integers(1, 9),
    turned=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_store_kv(
    guarded: Guarded,
    seed: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    block: int,
    turned: bool,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block) + 2
    slots = torch.randperm(blocks * block, generator=g)[:tokens]
    places = (slots // block, slots % block)
    angles = torch.randn(50, 2, size // 2, generator=g) if turned else None
    positions = torch.randint(50, (tokens,), generator=g)
    qkv = random(g, dtype, tokens, heads + 2 * kv_heads, size)
    pools = [random(g, dtype, blocks, kv_heads, block, size) for _ in range(2)]
    want = [t.clone() for t in (qkv, *pools)]
    plain.store_kv(want[0], heads, angles, positions, *places, *want[1:])
    native.store_kv(qkv, heads, angles, positions, *places, *pools)
    torch.testing.assert_close(
        qkv[:, :heads], want[0][:, :heads], atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5
    )
    for got, expected in zip(pools, want[1:], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "heads", "kv_heads", "size"), [(1, 48, 3, 1, 16), (5, 33, 4, 2, 20), (70, 64, 2, 2, 32)]
)
@pytest.mark.parametrize("plainly", [False, True])
def test_an_attention_layer_in_one_call_equals_its_parts(
    guarded: Guarded, batch: int, d: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, plainly: bool
) -> None:
    """plainly: without biases, angles and residual."""
    generator = torch.Generator().manual_seed(batch)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype) / shape[-1] ** 0.5

    width = (heads + 2 * kv_heads) * size
    qkv = native.Linear(random(width, d), None if plainly else random(width))
    out = native.Linear(random(d, heads * size), None if plainly else random(d))
    angles = None if plainly else torch.randn(40, 2, size // 2, generator=generator)
    x, residual = random(batch, d), None if plainly else random(batch, d)
    tables = torch.arange(3 * batch).view(batch, 3)
    contexts = 1 + torch.arange(batch) * 7 % 40
    positions = contexts - 1
    slots = tables.gather(1, positions[:, None] // 16)[:, 0].contiguous(), positions % 16
    pools = [random(3 * batch, kv_heads, 16, size) for _ in range(2)]
    separate = [pool.clone() for pool in pools]
    layer = native.AttentionLayer(qkv, out, heads, kv_heads, angles)
    got = layer(x, residual, positions, *slots, tables, contexts, 40, *pools)
    rows = qkv(x).view(batch, -1, size)
    native.store_kv(rows, heads, angles, positions, *slots, *separate)
    y = native.decode_attention(rows[:, :heads], *separate, tables, contexts, 40, size**-0.5)
    want = out(y.flatten(1), residual=residual)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(pools, separate, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "d"), [(1, 16), (3, 7), (2, 41), (130, 576)])
def test_rms_norm(guarded: Guarded, batch: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(d)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((batch, d), (d,)))
    got = native.rms_norm(x, weight, 1e-3)
    guarded.check()
    wide = x.double()
    expected = wide / (wide.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert got.dtype == dtype
    assert (got.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    assert (plain.rms_norm(x, weight, 1e-3).double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_activations_are_exact_over_their_range(guarded: Guarded) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, 100.0, 1e30])])[:, None]
    identity = native.Linear(torch.ones(1, 1))
    torch.testing.assert_close(identity(x, "gelu"), F.gelu(x.double()).float(), atol=1e-6, rtol=2e-6)
    torch.testing.assert_close(identity(x, "silu"), F.silu(x.double()).float(), atol=1e-6, rtol=2e-6)


def test_wrong_inputs_are_named() -> None:
    linear = native.Linear(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 5\] on cpu; expected torch.float32 \[2, 3\]"):
        linear(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 \[2, 3\]"):
        linear(torch.zeros(2, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="k is 65"):
        native.Ffn(**routed_layer(torch.Generator(), torch.float32, 8, 80, 65, 4))
    with pytest.raises(ValueError, match="kernels 'mmx' are not available"):
        native.use("mmx")


def test_one_openmp_runtime_serves_torch_and_us() -> None:
    native.Linear(torch.zeros(40, 30))(torch.zeros(2, 30))
    torch.zeros(100, 100) @ torch.zeros(100, 100)
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) == 1
