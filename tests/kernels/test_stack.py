"""All blocks in one call: the same bits as layer by layer, for every mixture of single tokens and chunks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.stack import FFN_PHASES, PHASES, Asked, BlockLayers, NormWeights, Stack

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]

BLOCK = 16
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["dense", "dsc", "moe"]


class Made:
    """Blocks of random weights and the inputs of a step: single tokens first, then chunks."""

    def __init__(
        self, kind: str, dtype: torch.dtype, decodes: int, chunks: list[int], d: int, size: int, plainly: bool = False
    ) -> None:
        self.generator = torch.Generator().manual_seed(decodes + d)
        self.dtype, self.heads, self.kv_heads, self.size = dtype, 4, 2, size
        self.angles = None if plainly else self.random(64, 2, size // 2).float()
        self.blocks = [self.block(kind, d, plainly) for _ in range(2)]
        sequences, tokens = decodes + len(chunks), decodes + sum(chunks)
        self.decodes, self.ids = decodes, torch.randint(50, (tokens,), generator=self.generator)
        self.words, self.places = self.random(50, d), None if plainly else self.random(64, d)
        contexts = [1 + 7 * i % 40 for i in range(decodes)] + [length + 9 * i for i, length in enumerate(chunks)]
        self.contexts = torch.tensor(contexts)
        self.longest = max(contexts[:decodes], default=0)
        self.tables = torch.randperm(4 * sequences, generator=self.generator).view(sequences, 4)
        starts = [decodes + sum(chunks[:i]) for i in range(len(chunks))]
        self.chunks = [(decodes + i, starts[i], chunks[i], contexts[decodes + i]) for i in range(len(chunks))]
        rows = [(i, contexts[i] - 1) for i in range(decodes)]
        rows += [(row, context - length + j) for row, _, length, context in self.chunks for j in range(length)]
        owners, positions = torch.tensor(rows).unbind(1)
        self.slots = positions.contiguous(), self.tables[owners, positions // BLOCK], positions % BLOCK
        shape = (4 * sequences, self.kv_heads, BLOCK, size)
        self.pools = [(self.random(*shape), self.random(*shape)) for _ in self.blocks]

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5).to(self.dtype)

    def norm(self, d: int, plainly: bool) -> NormWeights:
        return NormWeights(1 + self.random(d), None if plainly else self.random(d), 1e-5)

    def block(self, kind: str, d: int, plainly: bool) -> BlockLayers:
        width = (self.heads + 2 * self.kv_heads) * self.size
        qkv = native.Linear(self.random(width, d), None if plainly else self.random(width))
        out = native.Linear(self.random(d, self.heads * self.size), None if plainly else self.random(d))
        norms = self.norm(d, plainly), self.norm(d, plainly)
        return BlockLayers(
            norms[0], qkv, out, self.heads, self.kv_heads, self.angles, norms[1], self.ffn(kind, d, plainly)
        )

    def ffn(self, kind: str, d: int, plainly: bool) -> native.Ffn | native.Moe:
        hidden, gate = 24, None if plainly else self.random(24, d)
        up, down = self.random(hidden, d), self.random(d, hidden)
        if kind == "dense":
            return native.Ffn(up, gate, down, "silu")
        if kind == "moe":
            experts = [[self.random(hidden, d) for _ in range(3)] for _ in range(2)]
            downs = [self.random(d, hidden) for _ in range(3)]
            gates = None if plainly else experts[1]
            return native.Moe(self.random(3, d), None, experts[0], gates, downs, "gelu", 2, False, 1e-5)
        atoms = 40
        bank = self.random(atoms, d), self.random(atoms, d)
        return native.Ffn(
            up, gate, down, "gelu", self.random(atoms, d), None, *bank, torch.ones(d), k=4, tau=20, eps=1e-6
        )

    def stack(self) -> Stack:
        return Stack(self.words, self.places, self.blocks)

    @property
    def x(self) -> Tensor:
        words = self.words[self.ids]
        return words if self.places is None else words + self.places[self.slots[0]]

    def in_one_call(self, stack: Stack, asked: list[Asked] | None = None) -> Tensor:
        inputs = self.ids, self.slots, self.tables, self.contexts, self.decodes, self.longest, self.chunks
        return stack(*inputs, self.pools, asked)

    def layer_by_layer(self) -> Tensor:
        x, n, scale = self.x, self.decodes, self.size**-0.5
        for b, (keys, values) in zip(self.blocks, self.pools, strict=True):
            rows = b.qkv(native.norm(x, *b.norm1)).view(x.shape[0], -1, self.size)
            native.store_kv(rows, self.heads, self.angles, *self.slots, keys, values)
            q, y = rows[:, : self.heads], torch.empty(x.shape[0], self.heads, self.size, dtype=self.dtype)
            contexts = self.contexts[:n]
            if n:
                tables = self.tables[:n]
                y[:n] = native.decode_attention(q[:n], keys, values, tables, contexts, self.longest, scale)
            for row, start, length, context in self.chunks:
                own = slice(start, start + length)
                y[own] = native.chunk_attention(q[own], keys, values, self.tables[row], context, scale)
            x = b.out(y.flatten(1), residual=x)
            x = b.ffn(native.norm(x, *b.norm2), residual=x)
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("decodes", "chunks", "d", "size", "plainly"),
    [(1, [], 48, 16, False), (5, [3, 17], 33, 32, False), (0, [30], 40, 20, True), (27, [2], 64, 64, True)],
)
def test_blocks_in_one_call_equal_their_layers(
    kind: str, dtype: torch.dtype, decodes: int, chunks: list[int], d: int, size: int, plainly: bool
) -> None:
    """plainly: without biases, angles and gates."""
    made = Made(kind, dtype, decodes, chunks, d, size, plainly)
    before = [(keys.clone(), values.clone()) for keys, values in made.pools]
    want = made.layer_by_layer()
    made.pools, written = before, made.pools
    got = made.in_one_call(made.stack())
    assert torch.equal(got, want)
    for pair, expected in zip(made.pools, written, strict=True):
        assert all(torch.equal(*pools) for pools in zip(pair, expected, strict=True))


def test_picks_are_those_of_the_layer() -> None:
    made = Made("dsc", torch.float32, 6, [], 48, 16)
    del made.blocks[1:], made.pools[1:]
    (block,), (pools,) = made.blocks, made.pools
    asked = Asked.everything(6, 4)
    got = made.in_one_call(made.stack(), [asked])
    assert torch.equal(got, made.in_one_call(made.stack()))
    assert isinstance(block.ffn, native.Ffn)
    rows = block.qkv(native.norm(made.x, *block.norm1)).view(6, -1, 16)
    native.store_kv(rows, made.heads, made.angles, *made.slots, *pools)
    q = rows[:, : made.heads]
    y = native.decode_attention(q, *pools, made.tables, made.contexts, made.longest, 0.25)
    middle = block.out(y.flatten(1), residual=made.x)
    _, *picked = block.ffn.routed(native.norm(middle, *block.norm2))
    assert all(torch.equal(a, b) for a, b in zip(asked.picked, picked, strict=True))


@pytest.mark.parametrize("tokens", [7, 40])
def test_grouping_changes_no_bit(tokens: int) -> None:
    made = Made("dsc", torch.float32, tokens, [], 48, 16)
    assert torch.equal(made.in_one_call(made.stack()), made.in_one_call(made.stack(), 2 * [Asked(grouped=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_time_is_counted_by_phase_only_while_it_is_asked_for(kind: str) -> None:
    made = Made(kind, torch.float32, 30, [], 64, 16)
    stack = made.stack()
    made.in_one_call(stack)
    assert stack.spent == {}
    stack.measure(True)
    start = time.perf_counter()
    made.in_one_call(stack)
    taken = time.perf_counter() - start
    spent = stack.spent
    assert set(spent) == {*PHASES, *FFN_PHASES}
    assert all(spent[name] > 0 for name in PHASES)
    assert sum(spent[name] for name in PHASES) <= taken
    assert (spent["router"] > 0) == (spent["compose"] > 0) == (kind == "dsc")
    assert (spent["static"] > 0) == (kind != "moe")
    stack.measure(False)
    assert stack.spent == {}


def test_threads_that_came_later_are_counted_too() -> None:
    made = Made("dsc", torch.float32, 30, [], 64, 16)
    stack, before = made.stack(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stack.measure(True)
        torch.set_num_threads(3)
        made.in_one_call(stack)
        assert stack.spent["router"] > 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("token", "spoilt"), [(2, [2]), (6, [6, 7]), (16, list(range(16, 25)))])
def test_a_token_that_is_no_number_spoils_only_what_sees_it(
    kind: str, dtype: torch.dtype, token: int, spoilt: list[int]
) -> None:
    made = Made(kind, dtype, 5, [3, 17], 48, 16)
    made.ids = torch.randperm(50, generator=made.generator)[:25]
    stack = made.stack()
    clean = made.in_one_call(stack)
    made.words[made.ids[token]] = torch.nan
    got = made.in_one_call(stack)
    others = [i for i in range(25) if i not in spoilt]
    assert torch.equal(got[others], clean[others])
    assert not bool(got[spoilt].isfinite().any())


def changed(values: Tensor, at: int, value: int) -> Tensor:
    values = values.clone()
    values.view(-1)[at] = value
    return values


def test_inputs_that_do_not_fit_are_refused() -> None:
    made = Made("dsc", torch.float32, 2, [3], 48, 16)
    stack = made.stack()
    (positions, blocks, offsets), tables, contexts = made.slots, made.tables, made.contexts
    count, asked = len(made.pools[0][0]), Asked.everything(5, 4)
    strided = made.pools[0][0].transpose(0, 1).contiguous().transpose(0, 1)
    cases: list[tuple[str, dict[str, object]]] = [
        ("single tokens and chunks are 2 tokens, but there are 5", {"chunks": []}),
        ("chunk 0 .* does not fit", {"chunks": [(2, 2, 3, 65)]}),
        ("chunk 0 .* does not fit", {"chunks": [(2, 2, 4, 3)]}),
        ("chunk 0 .* does not fit", {"chunks": [(3, 2, 3, 9)]}),
        ("chunk 0 .* does not fit", {"chunks": [(2, 1, 3, 9)]}),
        ("chunk 1 .* does not fit", {"chunks": [(2, 2, 3, 9), (2, 5, 0, 9)]}),
        ("do not hold contexts of 65", {"longest": 65}),
        ("4 single tokens of 3 sequences", {"decodes": 4}),
        ("token ids: number 1 is 50", {"ids": changed(made.ids, 1, 50)}),
        ("positions: number 4 is 64", {"slots": (changed(positions, 4, 64), blocks, offsets)}),
        ("positions: number 0 is -1", {"slots": (changed(positions, 0, -1), blocks, offsets)}),
        (f"blocks: number 2 is {count}", {"slots": (positions, changed(blocks, 2, count), offsets)}),
        ("offsets: number 3 is 16", {"slots": (positions, blocks, changed(offsets, 3, 16))}),
        ("contexts: number 1 is 9", {"contexts": changed(contexts, 1, 9)}),
        ("contexts is torch.int32", {"contexts": contexts.int()}),
        ("contexts must be contiguous", {"contexts": contexts.repeat_interleave(2)[::2]}),
        ("tables is torch.int32", {"tables": tables.int()}),
        ("block table: number 0 is -7", {"tables": changed(tables, 0, -7)}),
        ("block table: number 0 is -7", {"tables": changed(tables, 8, -7)}),
        ("pools of 1 blocks", {"pools": made.pools[:1]}),
        ("a pool is", {"pools": [made.pools[0], (made.pools[1][0], made.pools[1][1][:, :, :8])]}),
        ("a pool must be contiguous", {"pools": 2 * [(strided, strided)]}),
        ("1 blocks are asked", {"asked": [asked]}),
        ("picks is", {"asked": 2 * [asked._replace(picks=torch.empty(4, 4, dtype=torch.int32))]}),
        ("weights is", {"asked": 2 * [asked._replace(weights=torch.empty(5, 3))]}),
    ]
    given: dict[str, object] = {"ids": made.ids, "slots": made.slots, "tables": tables, "contexts": contexts}
    given |= {"decodes": 2, "longest": made.longest, "chunks": made.chunks, "pools": made.pools, "asked": 2 * [asked]}
    want = stack(**given)
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            stack(**{**given, **wrong})
    assert torch.equal(stack(**given), want)
    dense = Made("dense", torch.float32, 2, [3], 48, 16)
    with pytest.raises(ValueError, match="only DSC layers"):
        dense.in_one_call(dense.stack(), 2 * [Asked(grouped=True)])


def test_blocks_that_do_not_fit_are_refused() -> None:
    made, half = Made("dense", torch.float32, 2, [3], 48, 16), Made("dense", torch.bfloat16, 2, [3], 48, 16)
    block = made.blocks[0]
    wide = native.Linear(torch.zeros(12 * 16, 48))
    for message, wrong in [
        ("a norm's vector", {"norm1": NormWeights(torch.ones(47), None, 1e-5)}),
        ("3 heads, 2 for keys; the first block has 4, 2", {"heads": 3}),
        ("4 heads, 4 for keys; the first block has 4, 2", {"kv_heads": 4, "qkv": wide}),
        ("projections .* do not fit", {"qkv": wide}),
        ("layers of a block are", {"ffn": half.blocks[0].ffn}),
        ("angles is", {"angles": torch.zeros(64, 2, 7)}),
    ]:
        with pytest.raises(ValueError, match=message):
            Stack(made.words, None, [block, block._replace(**wrong)])
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3"):
        Stack(made.words, None, [block._replace(kv_heads=3)])
