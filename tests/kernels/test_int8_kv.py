"""Keys and values in int8: rows, what is written, and attention over them, beside an oracle in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import native, plain, reference
from dsc_kernels.kv_rows import narrow_rows, widened_rows
from dsc_kernels.weights import SCALE_BYTES, KvCache, QkNorm, Slots

pytestmark = pytest.mark.usefixtures("instruction_set")
BACKENDS = [
    pytest.param(plain, id="plain"),
    pytest.param(native, id="native", marks=pytest.mark.skipif(native.active() is None, reason="no C++ compiler")),
]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def test_a_row_is_within_half_a_step() -> None:
    x = rows(7, 3, 24) * torch.logspace(-12, 6, 7)[:, None, None]
    kept = narrow_rows(x)
    assert kept.shape == (7, 3, 24 + SCALE_BYTES) and kept.dtype == torch.int8
    step = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((widened_rows(kept, torch.float32) - x).abs() <= 0.501 * step).all())


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 3], x[3, 3] = torch.nan, torch.inf, 1e-35
    back = widened_rows(narrow_rows(x), torch.float32)
    assert bool(back[1].isnan().all() and back[2].isnan().all())
    assert not bool(back[0].any()) and not bool(back[3].any())


def caches(blocks: int, kv_heads: int, block: int, size: int) -> KvCache:
    """Of random rows."""
    return KvCache(*(narrow_rows(rows(blocks, kv_heads, block, size, seed=s)) for s in (1, 2)))


@pytest.mark.skipif(native.active() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 24, 80, 6])
def test_native_kernels_write_what_plain_torch_writes(size: int, dtype: torch.dtype) -> None:
    heads, kv_heads, tokens = 4, 2, 9
    qkv = rows(tokens, heads + 2 * kv_heads, size).to(dtype)
    qkv[3, heads, 1], qkv[4, heads + kv_heads, 2] = torch.nan, torch.inf
    slots = Slots(torch.arange(tokens), torch.arange(tokens) % 3, torch.arange(tokens) // 3)
    found = []
    for backend in (plain, native):
        cache = KvCache(*(torch.zeros(3, kv_heads, 4, size + SCALE_BYTES, dtype=torch.int8) for _ in "kv"))
        backend.store_kv(qkv.clone(), heads, None, slots, cache)
        found.append(cache)
    for want, got in zip(*found, strict=True):
        assert int(widened_rows(want, torch.float32).isnan().sum()) == size
        assert torch.equal(want[..., :size], got[..., :size])
        wide = [part[..., size:].contiguous().view(torch.float32) for part in (want, got)]
        assert torch.equal(wide[0].isnan(), wide[1].isnan()) and torch.equal(*(own.nan_to_num() for own in wide))


@pytest.mark.parametrize("factor", [1e-20, 1.0, 3e5])
def test_levels_are_those_of_an_exact_division(factor: float) -> None:
    """127 / 3 and the like lie where a rounded reciprocal of the largest number gives another level."""
    x = (torch.arange(1, 4097)[:, None] * torch.arange(1, 255)[None] / 254).float() * factor
    inverse = (torch.full((4096, 1), 127.0) / x.amax(1, keepdim=True)).double()
    want = (x.double() * inverse).float().round()  # float32's product, rounded once
    assert torch.equal(narrow_rows(x)[:, :-SCALE_BYTES].float(), want)


def angles(positions: int, half: int) -> Tensor:
    """Cosines and sines [positions, 2, half]."""
    turns = torch.rand(positions, half, generator=generator(7)) * 6.3
    return torch.stack((turns.cos(), turns.sin()), dim=1)


def near_rows(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows in int8 are within half a step of float64 ones that were rounded twice to a dtype before."""
    step, most = (want.abs().amax(-1, keepdim=True) / 127), want.norm(dim=-1, keepdim=True)
    return bool(((got.double() - want).abs() <= 0.51 * step + torch.finfo(dtype).eps * most).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "turned"), [(64, 64), (24, 8), (6, 6)])
def test_rows_are_normed_and_turned_before_they_are_rounded(backend, size, turned, dtype) -> None:  # type: ignore[no-untyped-def]
    heads, kv_heads, tokens = 4, 2, 9
    qkv = rows(tokens, heads + 2 * kv_heads, size).to(dtype)
    norm = QkNorm(*(1 + 0.3 * rows(size, seed=s).to(dtype) for s in (3, 4)), 1e-5)
    cos_sin, slots = (
        angles(tokens, turned // 2),
        Slots(*(torch.arange(tokens) for _ in "pb"), torch.zeros(tokens).long()),
    )
    cache = KvCache(*(torch.zeros(tokens, kv_heads, 1, size + SCALE_BYTES, dtype=torch.int8) for _ in "kv"))
    wide = qkv.double()
    keys = reference.prepared_heads(wide[:, heads : heads + kv_heads], norm.key.double(), 1e-5, cos_sin.double())
    backend.store_kv(qkv.clone(), heads, cos_sin, slots, cache, norm)
    for part, want in zip(cache, (keys, wide[:, heads + kv_heads :]), strict=True):
        assert near_rows(widened_rows(part, torch.float32)[:, :, 0], want, dtype)


def oracle(q: Tensor, cache: KvCache, table: Tensor, context: int, scale: float) -> Tensor:
    """Attention of the last tokens q [n, heads, size], each up to itself, in float64."""
    count, heads, _ = q.shape
    k, v = (
        widened_rows(part[table], torch.float32).double().transpose(0, 1).flatten(1, 2)[:, :context] for part in cache
    )
    k, v = (part.repeat_interleave(heads // part.shape[0], 0) for part in (k, v))
    mask = torch.ones(count, context, dtype=torch.bool).tril(context - count)
    return F.scaled_dot_product_attention(q.double().transpose(0, 1), k, v, attn_mask=mask, scale=scale).transpose(0, 1)


def near(got: Tensor, want: Tensor) -> bool:
    return float((got.double() - want).norm() / want.norm()) < TOLERANCE[got.dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "block", "heads", "kv_heads"), [(64, 16, 6, 2), (24, 5, 4, 4), (80, 16, 3, 1), (6, 3, 2, 1)]
)
def test_single_tokens_attend(backend, size, block, heads, kv_heads, dtype) -> None:  # type: ignore[no-untyped-def]
    contexts = [1, block, 3 * block - 1, 7 * block + 2]
    cache = caches(40, kv_heads, block, size)
    tables = torch.randperm(40, generator=generator())[:32].view(4, 8)
    q = rows(4, heads, size, seed=5).to(dtype)
    got = backend.decode_attention(q, cache, tables, torch.tensor(contexts), max(contexts), size**-0.5)
    for i, context in enumerate(contexts):
        assert near(got[i : i + 1], oracle(q[i : i + 1], cache, tables[i], context, size**-0.5)), context


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "block", "heads", "kv_heads"), [(64, 16, 6, 2), (24, 5, 4, 4), (80, 16, 3, 1), (6, 3, 2, 1)]
)
@pytest.mark.parametrize(("count", "context"), [(1, 40), (17, 17), (70, 150)])
def test_chunks_attend(backend, size, block, heads, kv_heads, count, context, dtype) -> None:  # type: ignore[no-untyped-def]
    cache = caches(60, kv_heads, block, size)
    table = torch.randperm(60, generator=generator())[: -(-context // block)]
    q = rows(count, heads, size, seed=5).to(dtype)
    got = backend.chunk_attention(q, cache, table, context, size**-0.5)
    assert near(got, oracle(q, cache, table, context, size**-0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_others_left_behind_is_not_seen(backend) -> None:  # type: ignore[no-untyped-def]
    cache = caches(4, 1, 4, 16)
    q, table = rows(1, 2, 16), torch.tensor([[2, 1]])
    want = backend.decode_attention(q, cache, table, torch.tensor([5]), 5, 0.25)
    poison = narrow_rows(torch.full((16,), torch.nan))
    for part in cache:
        part[1, :, 1:], part[0], part[3] = poison, poison, poison
    assert torch.equal(backend.decode_attention(q, cache, table, torch.tensor([5]), 5, 0.25), want)


@pytest.mark.skipif(native.active() is None, reason="no C++ compiler")
def test_a_cache_that_does_not_fit_is_refused() -> None:
    cache = KvCache(*(torch.zeros(2, 1, 4, 16, dtype=torch.int8) for _ in "kv"))
    with pytest.raises(ValueError, match=r"expected torch\.int8 \[2, 1, 4, 20\]"):
        native.decode_attention(rows(1, 1, 16), cache, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1]), 1, 1.0)
