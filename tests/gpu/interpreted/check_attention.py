"""Paged decode attention against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from support.honest import DTYPES, TOLERANCE, Poisoned, banded, error, poisoned, random
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.gpu import attention, layers
from dsc_kernels.kv_rows import narrow_rows, widened_rows
from dsc_kernels.weights import KvCache, Scope


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, attention)
    yield stand_in
    stand_in.check()


def oracle(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, scale: float) -> Tensor:
    group, out = q.shape[1] // keys.shape[1], []
    for row, context in enumerate(contexts.tolist()):
        k, v = (
            pool[tables[row]].transpose(0, 1).flatten(1, 2)[:, :context].double().repeat_interleave(group, 0)
            for pool in (keys, values)
        )
        scores = (q[row].double()[:, None] @ k.transpose(1, 2)) * scale
        out.append((scores.softmax(-1) @ v)[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("contexts", "kv_heads", "group", "size", "block"),
    [
        ([1], 1, 1, 16, 1),
        ([1, 64, 65, 130], 2, 1, 64, 16),
        ([33, 7, 70], 1, 4, 20, 5),
        ([90, 17], 2, 3, 128, 7),
        ([1, 700, 512, 1030], 1, 2, 24, 16),
    ],
)
def test_attention(dtype: torch.dtype, contexts: list[int], kv_heads: int, group: int, size: int, block: int) -> None:
    g = torch.Generator().manual_seed(size)
    max_context_len, batch = max(contexts), len(contexts)
    width = -(-max_context_len // block)
    keys, values = (random(g, dtype, batch * width + 3, kv_heads, block, size) for _ in range(2))
    tables = torch.randperm(batch * width + 3, generator=g)[: batch * width].view(batch, width)
    q = random(g, dtype, batch, kv_heads * (group + 2), size)[:, : kv_heads * group]  # a slice of q, k, v
    lengths = banded(torch.tensor(contexts))
    got = attention.decode_attention(q, KvCache(keys, values), banded(tables), lengths, max_context_len, size**-0.5)
    assert got.dtype == dtype and error(got, oracle(q, keys, values, tables, lengths, size**-0.5)) < TOLERANCE[dtype]


def test_what_lies_behind_the_context_is_not_seen() -> None:
    g = torch.Generator().manual_seed(0)
    q, keys, values = (random(g, torch.float32, *shape) for shape in ((2, 2, 16), (40, 2, 16, 16), (40, 2, 16, 16)))
    tables, contexts = torch.arange(40).view(2, 20), torch.tensor([37, 300])
    clean = attention.decode_attention(q, KvCache(keys, values), tables, contexts, 300, 0.25)
    for pool in (keys, values):
        pool[2, :, 5:], pool[3:20], pool[38, :, 12:], pool[39] = (float("nan"),) * 4
    tables[0, 3:] = 0x7BADBAD
    assert torch.equal(attention.decode_attention(q, KvCache(keys, values), tables, contexts, 300, 0.25), clean)


@pytest.mark.parametrize("max_context_len", [60, 2000])
def test_an_empty_context_gives_zeros(max_context_len: int) -> None:
    ones = torch.ones(2, 1, 8, 16)
    tables = torch.zeros(2, 250, dtype=torch.int64)
    got = attention.decode_attention(
        torch.ones(2, 1, 16), KvCache(ones, ones), tables, torch.tensor([0, 5]), max_context_len, 0.25
    )
    assert bool((got[0] == 0).all()) and error(got[1], torch.ones(1, 16)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latent", [False, True])
def test_caches_in_int8_are_attended_to(dtype: torch.dtype, latent: bool) -> None:
    """By the layer, which is what a step calls, in whatever way."""
    g = torch.Generator().manual_seed(0)
    kept = [narrow_rows(random(g, dtype, 40, 2, 8, 24)) for _ in "kv"]
    tables, contexts = torch.randperm(40, generator=g)[:30].view(2, 15), torch.tensor([113, 37])
    q = random(g, dtype, 2, 6, 24)
    cache = KvCache.within(kept[0], 20) if latent else KvCache(*kept)
    keys, values = (widened_rows(rows, dtype) for rows in (kept[0], kept[0] if latent else kept[1]))
    got = layers.decode_attention(q, cache, tables, contexts, 113, 24**-0.5)
    want = oracle(q, keys, values[..., -20:] if latent else values, tables, contexts, 24**-0.5)
    assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]


def planned(contexts: list[int], kv_heads: int, most: int, window: int = 0) -> tuple[list[int], int]:
    """Splits of each sequence, and their length."""
    *starts, length = attention.split_contexts(torch.tensor(contexts), kv_heads, most, window).plan.tolist()
    return [end - begin for begin, end in pairwise(starts)], length


def test_contexts_are_split_by_their_lengths() -> None:
    assert planned([100], 6, 100) == ([1], 256)
    assert planned([1100], 6, 1100) == ([5], 256)
    assert planned([5000, 1, 0, 300], 8, 8192) == ([20, 1, 1, 2], 256)
    long, length = planned([32768] + 63 * [200], 8, 32768)
    assert long[0] >= 16 and long[1:] == 63 * [1] and length < 2048, "the long one is shared by many programs"
    assert planned([32768, 900], 1, 1 << 17, window=512) == ([2, 2], 256)
    for contexts in ([1 << 17] * 3, [1 << 17, 5, 70000], [1] * 256, [4096] * 64):
        counts, _ = planned(contexts, 8, 1 << 17)
        assert sum(counts) <= attention.most_splits(len(contexts), 8, 1 << 17)


@pytest.mark.parametrize("scope", [Scope(40), Scope(0, 2.0), Scope(300, 1.5)])
def test_windows_and_bounded_scores(scope: Scope) -> None:
    g = torch.Generator().manual_seed(1)
    keys, values = (random(g, torch.float32, 70, 2, 16, 24) for _ in "kv")
    tables, contexts = torch.randperm(70, generator=g)[:66].view(3, 22), torch.tensor([30, 340, 41])
    q = random(g, torch.float32, 3, 4, 24)
    got = attention.decode_attention(q, KvCache(keys, values), tables.int(), contexts.int(), 352, 0.3, scope)
    wide = (part.double() for part in (q, keys, values))
    want = reference.decode_attention(*wide, tables, contexts, 352, 0.3, scope)
    assert error(got, want) < TOLERANCE[torch.float32]


def test_wrong_inputs_are_named() -> None:
    q, ones, tables = torch.ones(1, 3, 16), torch.ones(2, 2, 8, 16), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2 key-value heads"):
        attention.decode_attention(q, KvCache(ones, ones), tables, torch.tensor([1]), 16, 1.0)
    with pytest.raises(ValueError, match=r"contexts is torch\.int16"):
        attention.decode_attention(q, KvCache(ones, ones), tables, torch.tensor([1]).short(), 16, 1.0)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts(dtype: torch.dtype) -> None:
    test_attention(dtype, [5000, 1, 2049], 2, 3, 64, 16)
