"""The C++ kernels below the layers against the float64 oracle, on every instruction set that this machine has.

Outputs are poisoned with NaN and lie between guard bands, so that what is not written and what is written too much both
show.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.layer_parts import ffn_parts
from support.native_cases import CASES, DTYPES, TOLERANCE, Guarded, error, random, routed_layer

from dsc_kernels import native, plain
from dsc_kernels.weights import Activation, KvCache, NormWeights, Slots

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]


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
    activation: Activation,
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


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 7),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([16, 20, 24, 64, 80, 128]),
    block=st.integers(1, 17),
    max_context_len=st.integers(1, 70),
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
    max_context_len: int,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    width = -(-max_context_len // block)
    blocks = batch * width + 3
    keys, values = (random(g, dtype, blocks, kv_heads, block, size) for _ in range(2))
    tables = torch.randperm(blocks, generator=g)[: batch * width].view(batch, width)
    contexts = torch.randint(1, max_context_len + 1, (batch,), generator=g)
    q = random(g, dtype, batch, kv_heads * group + 2 * kv_heads, size)[:, : kv_heads * group]  # a slice of q, k, v
    got = native.decode_attention(q, KvCache(keys, values), tables, contexts, max_context_len, size**-0.5)
    for row in range(batch):
        k, v = (plain.gather_context(p, tables[row : row + 1], int(contexts[row]))[0].double() for p in (keys, values))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q[row].double()[:, None] @ k.transpose(1, 2)) * size**-0.5
        assert error(got[row], (scores.softmax(-1) @ v)[:, 0]) < TOLERANCE[dtype]


@CASES
@given(
    seed=st.integers(0, 2**31),
    count=st.one_of(st.integers(1, 3), st.integers(1, 70)),
    before=st.one_of(st.integers(0, 70), st.integers(0, 700)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([1, 7, 16, 20, 33, 64, 80, 128]),
    block=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
)
def test_chunk_attention(
    guarded: Guarded,
    seed: int,
    count: int,
    before: int,
    kv_heads: int,
    group: int,
    size: int,
    block: int,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    heads, context = kv_heads * group, before + count
    width = -(-context // block)
    keys, values = (random(g, dtype, width + 2, kv_heads, block, size) for _ in range(2))
    table = torch.randperm(width + 2, generator=g)
    used = torch.zeros(width + 2, block, dtype=torch.bool)
    used[table[:width]] = (torch.arange(width * block) < context).view(width, block)
    for pool in (keys, values):
        pool.transpose(1, 2)[~used] = torch.nan  # what another sequence left
    q = random(g, dtype, count, heads + 2 * kv_heads, size)[:, :heads]  # a slice of q, k, v
    got = native.chunk_attention(q, KvCache(keys, values), table, context, size**-0.5)
    k, v = (plain.gather_context(pool, table[None], context)[0].double() for pool in (keys, values))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q.double().transpose(0, 1) @ k.transpose(1, 2)) * size**-0.5
    hidden = torch.ones(count, context, dtype=torch.bool).triu(before + 1)
    want = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    assert error(got, want) < TOLERANCE[dtype]
    cut = count // 2  # the first half as a chunk of its own: nothing depends on how a prompt is divided
    first = native.chunk_attention(q[:cut], KvCache(keys, values), table, before + cut, size**-0.5)
    assert torch.equal(first, got[:cut])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "kv_heads"), [(1, 1), (2, 1), (4, 1), (4, 3)])
def test_blocks_may_lie_in_any_order(guarded: Guarded, block: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Also so that the first and the last of some keys are as far apart as if those between followed each other."""
    g = torch.Generator().manual_seed(block)
    width = 32 // block
    cache = KvCache(*(random(g, dtype, width, kv_heads, block, 16) for _ in range(2)))
    q = random(g, dtype, 32, kv_heads, 16)
    for at in range(1, width):
        table = torch.arange(width)
        table[at - 1], table[at] = at, at - 1
        got = native.chunk_attention(q, cache, table, 32, 0.25)
        in_order = KvCache(*(part[table] for part in cache))
        assert torch.equal(got, native.chunk_attention(q, in_order, torch.arange(width), 32, 0.25))


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
    rows = torch.randperm(blocks * block, generator=g)[:tokens]
    cos_sin = torch.randn(50, 2, size // 2, generator=g) if turned else None
    slots = Slots(torch.randint(50, (tokens,), generator=g), rows // block, rows % block)
    qkv = random(g, dtype, tokens, heads + 2 * kv_heads, size)
    cache = KvCache(*(random(g, dtype, blocks, kv_heads, block, size) for _ in range(2)))
    want = [t.clone() for t in (qkv, *cache)]
    plain.store_kv(want[0], heads, cos_sin, slots, KvCache(*want[1:]))
    native.store_kv(qkv, heads, cos_sin, slots, cache)
    torch.testing.assert_close(
        qkv[:, :heads], want[0][:, :heads], atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5
    )
    for got, expected in zip(cache, want[1:], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("batch", "d"), [(1, 16), (3, 7), (2, 41), (130, 576)])
def test_norms(guarded: Guarded, batch: int, d: int, centred: bool, dtype: torch.dtype) -> None:
    """RMSNorm, and centred LayerNorm, with a mean as large as the deviation."""
    generator = torch.Generator().manual_seed(d)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((batch, d), (d,), (d,)))
    x, weight, bias = (x + 1).to(dtype), weight.to(dtype), bias.to(dtype)
    weights = NormWeights(weight, bias if centred else None, 1e-3)
    got = native.norm(x, weights)
    guarded.check()
    wide = x.double()
    if centred:
        wide = wide - wide.mean(1, keepdim=True)
    expected = wide / (wide.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    if centred:
        expected += bias.double()
    assert got.dtype == dtype
    assert (got.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    plainly = plain.norm(x, weights)
    assert (plainly.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


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
        native.Ffn(**ffn_parts(**routed_layer(torch.Generator(), torch.float32, 8, 80, 65, 4)))
    with pytest.raises(ValueError, match="kernels 'mmx' are not available"):
        native.use("mmx")


def test_one_openmp_runtime_serves_torch_and_us() -> None:
    native.Linear(torch.zeros(40, 30))(torch.zeros(2, 30))
    torch.zeros(100, 100) @ torch.zeros(100, 100)
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) == 1
