"""Attention within windows, with bounded scores, over values that lie within keys: what the oracle gives."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsc_kernels import native, plain, reference
from dsc_kernels.weights import KvCache, QkNorm, Scope, Slots

BLOCK = 16
WINDOWS = (0, 1, 5, 16, 63, 64, 65, 130)
CONTEXTS = (1, 2, 15, 64, 65, 130, 200)
DTYPES = [torch.float32, torch.bfloat16]
HEADS = {"few": (4, 2, 32, 32), "odd": (3, 1, 18, 18), "latent": (4, 1, 40, 24), "wide": (2, 1, 576, 512)}
BACKENDS = {"plain": plain, "native": native}

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "native" and not native.available():
        pytest.skip("installed without a C++ compiler")
    return BACKENDS[request.param]


class Context:
    """Queries, and a pool whose blocks hold sequences in any order; what belongs to nobody is NaN."""

    def __init__(self, kind: str, dtype: torch.dtype, contexts: tuple[int, ...], new: int = 1) -> None:
        heads, kv_heads, size, value_size = HEADS[kind]
        generator = torch.Generator().manual_seed(size + sum(contexts))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        pages = max(-(-context // BLOCK) for context in contexts)
        blocks = len(contexts) * pages + 1
        self.tables = 1 + torch.randperm(blocks - 1, generator=generator).view(len(contexts), pages)
        keys, values = (torch.full((blocks, kv_heads, BLOCK, size), torch.nan, dtype=dtype) for _ in range(2))
        for table, context in zip(self.tables, contexts, strict=True):
            for pool in (keys, values):
                rows = random(context, kv_heads, size)
                at = torch.arange(context)
                pool[table[at // BLOCK], :, at % BLOCK] = rows
        self.cache = KvCache(keys, values) if value_size == size else KvCache.within(keys, value_size)
        self.contexts, self.scale = torch.tensor(contexts), size**-0.5
        self.q = random(len(contexts) if new == 1 else new, heads, size)

    def forget(self, window: int) -> None:
        """What lies behind every window is another's: its block in the tables is one of NaN."""
        for table, context in zip(self.tables, self.contexts.tolist(), strict=True):
            table[: max(0, context + 1 - window - len(self.q)) // BLOCK if window else 0] = 0

    def oracle(self, q: Tensor, tables: Tensor, contexts: Tensor, scope: Scope) -> Tensor:
        pools = self.cache.keys.double(), self.cache.values.double()
        return reference.decode_attention(q.double(), *pools, tables, contexts, 0, self.scale, scope)


def error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max())


def bound(dtype: torch.dtype) -> float:
    return 4e-6 if dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_single_tokens_are_those_of_the_oracle(kind: str, dtype: torch.dtype, cap: float, backend: ModuleType) -> None:
    for window in WINDOWS:
        c, scope = Context(kind, dtype, CONTEXTS), Scope(window, cap)
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
        for new, context in ((1, 1), (2, 3), (7, 7), (7, 150), (100, 100), (100, 230)):
            c, scope = Context(kind, dtype, (context,), new), Scope(window, cap)
            seen = torch.arange(context - new + 1, context + 1)
            want = c.oracle(c.q, c.tables.expand(new, -1), seen, scope)
            c.forget(window)
            got = backend.chunk_attention(c.q, c.cache, c.tables[0], context, c.scale, scope)
            assert error(got, want) < bound(dtype), (window, new, context)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_a_prompt_is_cut_changes_no_bit(dtype: torch.dtype) -> None:
    c, scope = Context("few", dtype, (200,), 100), Scope(37, 2.0)
    whole = native.chunk_attention(c.q, c.cache, c.tables[0], 200, c.scale, scope)
    parts = [
        native.chunk_attention(
            c.q[start : start + 23], c.cache, c.tables[0], min(100 + start + 23, 200), c.scale, scope
        )
        for start in range(0, 100, 23)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("spoilt", ["keys", "values"])
def test_a_number_that_is_none_spoils_those_that_see_it_alone(spoilt: str, backend: ModuleType) -> None:
    window, at, context = 20, 70, 150
    c = Context("few", torch.float32, (context,), context)
    getattr(c.cache, spoilt)[c.tables[0][at // BLOCK], :, at % BLOCK, 3] = torch.nan
    got = backend.chunk_attention(c.q, c.cache, c.tables[0], context, c.scale, Scope(window))
    bad = got.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    assert bad == list(range(at, at + window))


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_what_does_not_fit_is_refused() -> None:
    c = Context("latent", torch.float32, (20,))
    args = c.tables, c.contexts, 20, c.scale
    with pytest.raises(ValueError, match="a window of -1"):
        native.decode_attention(c.q, c.cache, *args, Scope(-1))
    with pytest.raises(ValueError, match="scores within nan"):
        native.decode_attention(c.q, c.cache, *args, Scope(0, float("nan")))
    with pytest.raises(ValueError, match="are not the last of these"):
        native.decode_attention(c.q, KvCache(c.cache.keys, c.cache.values.contiguous()), *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_latent_key_is_normed_where_it_is_a_value_and_turned_before(dtype: torch.dtype, backend: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, heads, size, value_size, turned = 9, 3, 40, 24, 16
    qkv = torch.randn(tokens, heads + 1, size, generator=generator).to(dtype)
    weight = 1 + torch.randn(value_size, generator=generator).to(dtype)
    cos_sin = torch.randn(tokens, 2, turned // 2, generator=generator)
    cache = KvCache.within(torch.full((4, 1, BLOCK, size), torch.nan, dtype=dtype), value_size)
    positions = torch.arange(tokens)
    slots = Slots(positions, torch.full((tokens,), 2), positions)
    wide, angles = qkv.double(), cos_sin.double()
    q = reference.prepared_heads(wide[:, :heads], None, 1e-5, angles)
    key = reference.prepared_heads(wide[:, heads:], None, 1e-5, angles)
    key[..., size - value_size :] = reference.norm(wide[:, heads:, size - value_size :], weight.double(), None, 1e-5)
    backend.store_kv(qkv, heads, cos_sin, slots, cache, QkNorm(None, weight, 1e-5))
    exact = 1e-6 if dtype == torch.float32 else 1e-2
    assert error(qkv[:, :heads], q) < exact
    assert error(cache.keys[2, :, :tokens].transpose(0, 1), key) < exact
    values = cache.values[2, :, :tokens]
    assert torch.equal(values, cache.keys[2, :, :tokens, size - value_size :])
