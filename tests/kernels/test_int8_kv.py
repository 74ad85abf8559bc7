"""Keys and values in int8: rows, what is written, and attention over them, beside an oracle in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import native, plain
from dsc_kernels.kv_rows import narrow_rows, widened_rows
from dsc_kernels.weights import SCALE_BYTES, KvCache, Slots

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
        found.append([widened_rows(part, torch.float32) for part in cache])
    for want, got in zip(*found, strict=True):
        assert torch.equal(want.isnan(), got.isnan()) and int(want.isnan().sum()) == size
        step = want.nan_to_num().abs().amax(-1, keepdim=True) / 127
        assert bool(((want - got).nan_to_num().abs() <= 1.01 * step).all())


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
