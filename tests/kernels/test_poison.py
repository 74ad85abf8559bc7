"""A token whose numbers are no numbers touches no earlier token of its request, and no other request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.native_cases import CASES, DTYPES, random

from dsc_kernels import native, ops
from dsc_kernels.backend import Backend
from dsc_kernels.weights import KvCache


@pytest.fixture(params=["plain", *native.available()])
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    ops.use(request.param)
    yield ops.backend(torch.float32, torch.device("cpu"))
    ops.use("auto")


@CASES
@given(
    seed=st.integers(0, 2**31),
    count=st.one_of(st.integers(1, 4), st.integers(1, 90)),
    before=st.integers(0, 130),
    place=st.integers(0, 2**31),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    size=st.sampled_from([1, 7, 16, 33, 64, 80]),
    block=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    of_values=st.booleans(),
    poison=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_tokens_of_a_chunk(
    kernels: Backend,
    seed: int,
    count: int,
    before: int,
    place: int,
    kv_heads: int,
    group: int,
    size: int,
    block: int,
    dtype: torch.dtype,
    of_values: bool,
    poison: float,
) -> None:
    g = torch.Generator().manual_seed(seed)
    context, at = before + count, place % count
    width = -(-context // block)
    cache = KvCache(*(random(g, dtype, width + 1, kv_heads, block, size) for _ in range(2)))
    table = torch.randperm(width + 1, generator=g)[:width]
    q = random(g, dtype, count, kv_heads * group, size)
    clean = kernels.chunk_attention(q, cache, table, context, size**-0.5)
    page, line, column = table[(before + at) // block], (before + at) % block, place % size
    cache[of_values][page, :, line, column] = poison
    got = kernels.chunk_attention(q, cache, table, context, size**-0.5)
    assert torch.equal(got[:at], clean[:at])
    seen = got[at:, :, column] if of_values else got[at:]
    if poison != poison:
        assert not seen.isfinite().any()
    assert of_values or not got[at:].isinf().any()


@CASES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 5),
    group=st.integers(1, 3),
    size=st.sampled_from([7, 16, 64]),
    block=st.integers(1, 17),
    max_context_len=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_what_others_left_in_the_cache(
    kernels: Backend, seed: int, batch: int, group: int, size: int, block: int, max_context_len: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    width = -(-max_context_len // block)
    cache = KvCache(*(random(g, dtype, batch * width + 2, 2, block, size) for _ in range(2)))
    tables = torch.randperm(batch * width + 2, generator=g)[: batch * width].view(batch, width)
    contexts = torch.randint(1, max_context_len + 1, (batch,), generator=g)
    q = random(g, dtype, batch, 2 * group, size)
    clean = kernels.decode_attention(q, cache, tables, contexts, max_context_len, size**-0.5)
    used = torch.zeros(batch * width + 2, block, dtype=torch.bool)
    used[tables] = (torch.arange(width * block) < contexts[:, None]).view(batch, width, block)
    for part in cache:
        part.transpose(1, 2)[~used] = torch.nan
    assert torch.equal(kernels.decode_attention(q, cache, tables, contexts, max_context_len, size**-0.5), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_context_gives_zeros(kernels: Backend, dtype: torch.dtype) -> None:
    ones = torch.ones(2, 1, 8, 20, dtype=dtype)
    q, tables = torch.ones(2, 3, 20, dtype=dtype), torch.zeros(2, 1, dtype=torch.int64)
    got = kernels.decode_attention(q, KvCache(ones, ones), tables, torch.tensor([0, 5]), 8, 0.25)
    assert torch.equal(got[0], torch.zeros(3, 20, dtype=dtype)) and torch.equal(got[1], torch.ones(3, 20, dtype=dtype))
