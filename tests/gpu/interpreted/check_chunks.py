"""Attention of chunks of prompts, all of a step in one launch, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import DTYPES, TOLERANCE, Poisoned, banded, error, poisoned, random
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.gpu import chunk_attention
from dsc_kernels.weights import KvCache, Scope

PAGES = 80


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, chunk_attention)
    yield stand_in
    stand_in.check()


class Case:
    """Chunks (length, context) of sequences whose tables are shuffled, behind `singles` rows of others."""

    def __init__(
        self, chunks: list[tuple[int, int]], kv_heads: int, group: int, size: int, dtype: torch.dtype, singles: int = 2
    ) -> None:
        g = torch.Generator().manual_seed(size)
        self.block, width = 8, max(-(-context // 8) for _, context in chunks)
        pool = singles + len(chunks) * width + 3
        self.keys, self.values = (random(g, dtype, pool, kv_heads, self.block, size) for _ in "kv")
        rows = singles + len(chunks)
        self.tables = torch.randperm(pool, generator=g).repeat(2)[: rows * width].view(rows, width)
        self.chunks, start = [], singles
        for row, (length, context) in enumerate(chunks, singles):
            self.chunks.append((row, start, length, context))
            start += length
        self.q = random(g, dtype, start, kv_heads * (group + 2), size)[:, : kv_heads * group]
        self.group, self.scale = group, size**-0.5

    def computed(self, scope: Scope = Scope()) -> Tensor:  # noqa: B008  it is immutable
        tiles = chunk_attention.cut(self.chunks, self.group, torch.device("cpu"))
        out = banded(torch.full(self.q.shape, 7.0, dtype=self.q.dtype))
        tables = banded(self.tables.int())
        chunk_attention.chunk_attention(self.q, KvCache(self.keys, self.values), tables, tiles, out, self.scale, scope)
        return out

    def oracle(self, scope: Scope = Scope()) -> Tensor:  # noqa: B008
        want = torch.full(self.q.shape, 7.0, dtype=torch.float64)
        for row, start, length, context in self.chunks:
            own = torch.arange(context - length + 1, context + 1)
            q, keys, values = (part.double() for part in (self.q[start : start + length], self.keys, self.values))
            tables = self.tables[row].expand(length, -1)
            want[start : start + length] = reference.decode_attention(
                q, keys, values, tables, own, context, self.scale, scope
            )
        return want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("chunks", "kv_heads", "group", "size"),
    [([(1, 1), (9, 9), (70, 90)], 2, 1, 16), ([(40, 131), (3, 66)], 1, 3, 20)],
)
def test_each_token_sees_what_is_before_it(
    dtype: torch.dtype, chunks: list[tuple[int, int]], kv_heads: int, group: int, size: int
) -> None:
    case = Case(chunks, kv_heads, group, size, dtype)
    assert error(case.computed(), case.oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("scope", [Scope(5), Scope(70), Scope(0, 2.0), Scope(33, 1.0)])
def test_windows_and_bounded_scores(scope: Scope) -> None:
    case = Case([(20, 150), (66, 66)], 1, 2, 16, torch.float32)
    assert error(case.computed(scope), case.oracle(scope)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("which", ["keys", "values"])
def test_what_is_not_finite_spoils_those_who_see_it_alone(which: str) -> None:
    case = Case([(70, 75)], 1, 1, 16, torch.float32, singles=0)
    clean = case.computed()
    position = 40  # of the chunk the 36th
    part = getattr(case, which)
    part[case.tables[0, position // 8], 0, position % 8, 3] = float("nan")
    got = case.computed()
    assert torch.equal(got[:35], clean[:35]) and bool(got[35:].isnan().any(-1).all())


def test_what_lies_behind_a_chunk_is_not_seen() -> None:
    case = Case([(9, 20)], 2, 1, 16, torch.float32, singles=0)
    clean = case.computed()
    case.keys[case.tables[0, 2], :, 4:], case.values[case.tables[0, 2], :, 4:] = float("nan"), float("nan")
    assert torch.equal(case.computed(), clean)


def test_wrong_inputs_are_named() -> None:
    case = Case([(9, 20)], 2, 1, 16, torch.float32)
    cache, tiles = KvCache(case.keys, case.values), chunk_attention.cut(case.chunks, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="tiles are of 16 tokens; with these heads 64"):
        chunk_attention.chunk_attention(case.q, cache, case.tables, tiles, torch.empty(case.q.shape), 1.0)
