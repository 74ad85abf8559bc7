"""Attention over caches in int8 within windows, with bounded scores, and over values that lie within keys."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from test_int8_kv import angles, near_rows
from test_scopes import BLOCK, CONTEXTS, DTYPES, HEADS, Context, backend, bound, error
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.kv_rows import narrow_rows, widened_rows
from dsc_kernels.weights import SCALE_BYTES, KvCache, QkNorm, Scope, Slots

WINDOWS = (0, 1, 16, 65)
pytestmark = pytest.mark.usefixtures("instruction_set")
__all__ = ["backend"]  # a fixture


class NarrowContext(Context):
    """The same with its pools in int8; what belongs to nobody is NaN still."""

    def __init__(self, kind: str, dtype: torch.dtype, contexts: tuple[int, ...], new: int = 1) -> None:
        super().__init__(kind, dtype, contexts, new)
        wide, value_size = self.cache, HEADS[kind][3]
        keys = narrow_rows(wide.keys)
        self.cache = KvCache.within(keys, value_size) if wide.latent else KvCache(keys, narrow_rows(wide.values))
        assert self.cache.in_int8 and self.cache.latent == wide.latent
        assert self.cache.values.shape[-1] == value_size + (0 if wide.latent else SCALE_BYTES)

    def oracle(self, q: Tensor, tables: Tensor, contexts: Tensor, scope: Scope) -> Tensor:
        """In float64 over what the rows stand for, as kernels of the queries' dtype take it."""
        own, keys = self.cache, widened_rows(self.cache.keys, q.dtype)
        wide = (
            KvCache.within(keys, own.values.shape[-1])
            if own.latent
            else KvCache(keys, widened_rows(own.values, q.dtype))
        )
        self.cache = wide
        try:
            return super().oracle(q, tables, contexts, scope)
        finally:
            self.cache = own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_single_tokens_are_those_of_the_oracle(kind: str, dtype: torch.dtype, cap: float, backend: ModuleType) -> None:
    for window in WINDOWS:
        c, scope = NarrowContext(kind, dtype, CONTEXTS), Scope(window, cap)
        want = c.oracle(c.q, c.tables, c.contexts, scope)
        if window:
            for table, context in zip(c.tables, CONTEXTS, strict=True):
                table[: max(0, context - window) // BLOCK] = 0
        got = backend.decode_attention(c.q, c.cache, c.tables, c.contexts, max(CONTEXTS), c.scale, scope)
        assert error(got, want) < bound(dtype), window


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_chunks_are_those_of_the_oracle(kind: str, dtype: torch.dtype, cap: float, backend: ModuleType) -> None:
    for window in WINDOWS:
        for new, context in ((1, 1), (7, 150), (100, 230)):
            c, scope = NarrowContext(kind, dtype, (context,), new), Scope(window, cap)
            seen = torch.arange(context - new + 1, context + 1)
            want = c.oracle(c.q, c.tables.expand(new, -1), seen, scope)
            c.forget(window)
            got = backend.chunk_attention(c.q, c.cache, c.tables[0], context, c.scale, scope)
            assert error(got, want) < bound(dtype), (window, new, context)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_rows_are_normed_and_turned_before_they_are_rounded(dtype: torch.dtype, backend: ModuleType) -> None:
    """Normed but for what is turned, turned, and then rounded: one row for keys and values."""
    heads, size, value_size, tokens = 3, 40, 24, 9
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, heads + 1, size, generator=generator).to(dtype)
    cos_sin = angles(20, (size - value_size) // 2)
    norm = QkNorm(None, torch.rand(value_size, generator=generator).to(dtype) + 0.5, 1e-5)
    slots = Slots(torch.arange(tokens), torch.arange(tokens) % 3, torch.arange(tokens) // 3)
    wide = qkv[:, heads:].double()
    own = reference.norm(wide[..., -value_size:], norm.key.double(), None, 1e-5)
    turned = reference.prepared_heads(wide, None, 1e-5, cos_sin[:tokens].double())[..., :-value_size]
    keys = torch.zeros(3, 1, 4, size + SCALE_BYTES, dtype=torch.int8)
    backend.store_kv(qkv.clone(), heads, cos_sin, slots, KvCache.within(keys, value_size), norm)
    got = widened_rows(keys, torch.float32)[slots.blocks, :, slots.offsets]
    assert near_rows(got, torch.cat((turned, own), dim=-1), dtype)
    assert int(keys.any(-1).sum()) == tokens
