"""All layers of a decoder in one call, against the same layers one by one in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import DTYPES, Poisoned, banded, error, poisoned, random
from torch import Tensor

from dsc_kernels import plain, reference
from dsc_kernels.gpu import add_norm, product, qkv
from dsc_kernels.weights import KvCache, NormWeights, QkNorm, Slots

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, add_norm, product, qkv)
    yield stand_in
    stand_in.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
def test_sums_and_norms(dtype: torch.dtype, centred: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x, further = random(g, dtype, 5, 67), random(g, dtype, 5, 67)
    slots = random(g, torch.float32, 5, 3, 67)
    norm = NormWeights(random(g, dtype, 67), random(g, dtype, 67) if centred else None, 1e-5)
    parts = add_norm.Parts(slots, 3, 67, 3 * 67, further)
    found = add_norm.add_norm(x, parts, norm, 1e-4)
    total = x.double() + slots.double().sum(1) + further.double()
    assert error(found.x, total) < TOLERANCE[dtype]
    bias = None if norm.bias is None else norm.bias.double()
    assert error(found.normed, reference.norm(found.x.double(), norm.weight.double(), bias, 1e-5)) < TOLERANCE[dtype]
    assert found.rstd is not None
    spread = found.normed.double().var(1, correction=0)
    assert error(found.rstd, (spread + 1e-4).rsqrt()) < 1e-6
    assert error(add_norm.summed(x, parts, dtype), total) < TOLERANCE[dtype]
    first = add_norm.add_norm(x, None, norm, None)
    assert first.x is x and first.rstd is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "d", "n"), [(1, 67, 41), (17, 1100, 20), (70, 40, 130)])
def test_products(dtype: torch.dtype, tokens: int, d: int, n: int) -> None:
    g = torch.Generator().manual_seed(d)
    x, weight, bias = random(g, dtype, tokens, d), random(g, dtype, n, d, scale=d**-0.5), random(g, dtype, n)
    parts = product.multiply(x, weight, bias)
    assert len(parts) > 1 or d < 1000, "long sums are split"
    assert error(parts.sum(0), x.double() @ weight.double().T + bias.double()) < 3e-6


class Heads:
    """Heads of some tokens, and a cache that they go to."""

    def __init__(self, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, size: int, turned: int) -> None:
        g = torch.Generator().manual_seed(size)
        self.heads, self.tokens, self.size, d = heads, tokens, size, 50
        self.x = random(g, dtype, tokens, d)
        self.weight = random(g, dtype, (heads + 2 * kv_heads) * size, d, scale=d**-0.5)
        self.bias = random(g, dtype, len(self.weight))
        angles = torch.rand(90, turned // 2, generator=g) * 6
        self.cos_sin = banded(torch.stack((angles.cos(), angles.sin()), 1)) if turned else None
        places = torch.randperm(3 * tokens * 4, generator=g)[:tokens]
        positions = torch.randint(90, (tokens,), generator=g)
        self.slots = Slots(*(banded(part.int()) for part in (positions, places // 4, places % 4)))
        self.cache = KvCache(*(banded(torch.full((3 * tokens, kv_heads, 4, size), 5.0, dtype=dtype)) for _ in "kv"))

    def wanted(self, qk_norm: QkNorm | None = None) -> tuple[Tensor, KvCache]:
        """Queries and caches as plain torch has them, from products in float64."""
        wide = KvCache(*(part.double() for part in self.cache))
        rows = (self.x.double() @ self.weight.double().T + self.bias.double()).view(self.tokens, -1, self.size)
        cos_sin = None if self.cos_sin is None else self.cos_sin.double()
        norms = None
        if qk_norm is not None:
            query = None if qk_norm.query is None else qk_norm.query.double()
            norms = QkNorm(query, qk_norm.key.double(), qk_norm.eps)
        plain.store_kv(rows, self.heads, cos_sin, Slots(*(part.long() for part in self.slots)), wide, norms)
        return rows[:, : self.heads], wide

    def check(self, q: Tensor, want: tuple[Tensor, KvCache], dtype: torch.dtype) -> None:
        assert error(q, want[0]) < TOLERANCE[dtype]
        for got, wide in zip(self.cache, want[1], strict=True):
            assert error(got, wide) < TOLERANCE[dtype] and torch.equal(got == 5, wide == 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "turned"), [(3, 4, 2, 32, 32), (17, 2, 1, 16, 0), (2, 1, 1, 128, 128)]
)
def test_heads_come_out_of_their_product_as_attention_takes_them(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, size: int, turned: int
) -> None:
    case = Heads(dtype, tokens, heads, kv_heads, size, turned)
    want = case.wanted()
    assert qkv.projects(size, case.cos_sin)
    q = qkv.project(case.x, case.weight, case.bias, heads, case.cos_sin, case.slots, case.cache)
    case.check(q, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "turned", "normed"), [(20, 20, 2), (24, 8, 0), (16, 0, 1), (32, 0, 0)])
def test_heads_are_normed_and_turned_and_written(dtype: torch.dtype, size: int, turned: int, normed: int) -> None:
    case = Heads(dtype, 3, 3, 1, size, turned)
    g = torch.Generator().manual_seed(0)
    key, query = random(g, dtype, size), random(g, dtype, size)
    norm = QkNorm(query if normed == 2 else None, key, 1e-5) if normed == 2 else None
    want = case.wanted(norm)
    rows = (case.x.double() @ case.weight.double().T + case.bias.double()).to(dtype).view(3, -1, size).clone()
    qkv.store_kv(rows, 3, case.cos_sin, case.slots, case.cache, norm)
    case.check(rows[:, :3], want, dtype)
