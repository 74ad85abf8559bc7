"""A token and its drafts attend as single tokens do: the same bits, whatever else a step computes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from test_scopes import BLOCK, DTYPES, HEADS
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.kv_rows import narrow_rows
from dsc_kernels.weights import DecoderLayer, FfnOptions, KvCache, MlpWeights, NormWeights, Scope, Slots

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]

WIDTH, VOCABULARY = 40, 50


class Sequence(NamedTuple):
    """New tokens of it, the last of `context`."""

    length: int
    context: int


SINGLES = [Sequence(1, 1), Sequence(1, 64), Sequence(1, 70)]
# within a block of keys, over its border, from its first on, over several of them, and more than attend together
DRAFTED = [Sequence(2, 2), Sequence(3, 66), Sequence(8, 72), Sequence(2, 128), Sequence(9, 201), Sequence(80, 150)]
PROMPTS = [Sequence(20, 20), Sequence(5, 90)]


class Step:
    """Two layers of random weights, and sequences in blocks in any order."""

    def __init__(self, kind: str, dtype: torch.dtype, scope: Scope, int8: bool, sequences: list[Sequence]) -> None:
        self.heads, self.kv_heads, self.size, self.value_size = HEADS[kind]
        self.generator, self.dtype = torch.Generator().manual_seed(self.size), dtype
        self.sequences, latent = sequences, self.value_size < self.size
        pages = -(-max(one.context for one in sequences) // BLOCK)
        self.tables = torch.randperm(len(sequences) * pages, generator=self.generator).view(-1, pages)
        rows = [(i, one.context - one.length + j) for i, one in enumerate(sequences) for j in range(one.length)]
        self.owners, self.positions = torch.tensor(rows).T.contiguous()
        self.ids = torch.randint(VOCABULARY, (len(rows),), generator=self.generator)
        self.token_embedding = self.random(VOCABULARY, WIDTH)
        self.layers = [self.layer(scope) for _ in range(2)]
        self.kv_caches: list[KvCache] = []
        for _ in self.layers:
            wide = [self.random(self.tables.numel(), self.kv_heads, BLOCK, self.size) for _ in range(2)]
            keys, values = [narrow_rows(part) for part in wide] if int8 else wide
            self.kv_caches.append(KvCache.within(keys, self.value_size) if latent else KvCache(keys, values))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def layer(self, scope: Scope) -> DecoderLayer:
        norm = NormWeights(1 + self.random(WIDTH), None, 1e-5)
        parts = self.heads + (1 if self.value_size < self.size else 2) * self.kv_heads
        mlp = MlpWeights(self.random(24, WIDTH), self.random(24, WIDTH), self.random(WIDTH, 24))
        return DecoderLayer(
            attention_norm=norm,
            qkv=native.Linear(self.random(parts * self.size, WIDTH)),
            out=native.Linear(self.random(WIDTH, self.heads * self.value_size)),
            heads=self.heads,
            kv_heads=self.kv_heads,
            size=self.size,
            scope=scope,
            cos_sin_cache=None,
            ffn_norm=norm,
            ffn=native.Ffn(mlp, FfnOptions(activation="silu")),
        )

    def outputs(self, singles: int, drafted: int) -> Tensor:
        """[T, width] of a step whose first so many sequences are single tokens, and the next ones have drafts."""
        chunks, start = [], singles
        for row, (length, context) in enumerate(self.sequences[singles:], singles):
            chunks.append((row, start, length, context))
            start += length
        return self.run(self.tables, [one.context for one in self.sequences], singles, chunks, drafted)

    def one_by_one(self) -> Tensor:
        """Every token is the only one of a sequence of its own, which sees what those before it have written."""
        return self.run(self.tables[self.owners].contiguous(), (self.positions + 1).tolist(), len(self.ids), [], 0)

    def run(
        self,
        tables: Tensor,
        contexts: list[int],
        singles: int,
        chunks: list[tuple[int, int, int, int]],
        drafted: int,
    ) -> Tensor:
        stack = native.Stack(self.token_embedding, None, self.layers)
        blocks = self.tables[self.owners, self.positions // BLOCK]
        slots = Slots(self.positions, blocks, self.positions % BLOCK)
        most = max(contexts[:singles], default=0)
        caches = [
            KvCache.within(own.keys.clone(), self.value_size)
            if own.latent
            else KvCache(own.keys.clone(), own.values.clone())
            for own in self.kv_caches
        ]
        contexts_of_rows = torch.tensor(contexts)
        return stack(self.ids, slots, tables, contexts_of_rows, singles, most, chunks, caches, drafted=drafted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("scope", [Scope(), Scope(0, 1.5), Scope(70, 0.0)], ids=str)
def test_they_are_those_of_single_tokens(kind: str, dtype: torch.dtype, int8: bool, scope: Scope) -> None:
    for singles, drafted, prompts in (
        ([], DRAFTED[:1], []),
        ([], DRAFTED[4:5], []),
        (SINGLES, DRAFTED, []),
        (SINGLES, DRAFTED[1:4], PROMPTS),
    ):
        step = Step(kind, dtype, scope, int8, [*singles, *drafted, *prompts])
        own = sum(one.length for one in [*singles, *drafted])
        got, want = step.outputs(len(singles), len(drafted)), step.one_by_one()
        assert torch.equal(got[:own], want[:own])
        assert torch.isfinite(got).all()


def test_they_do_not_depend_on_threads() -> None:
    """With few sequences each is divided among them."""
    step, before = Step("few", torch.bfloat16, Scope(), False, DRAFTED[4:5]), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(step.outputs(0, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("drafted", [-1, 2])
def test_more_than_there_are_chunks_are_refused(drafted: int) -> None:
    step = Step("few", torch.float32, Scope(), False, DRAFTED[:1])
    with pytest.raises(ValueError, match=f"{drafted} chunks with drafts among 1"):
        step.outputs(0, drafted)
