"""All layers in one call: the same bits as layer by layer, for every mixture of single tokens and chunks."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from support.layer_parts import ffn_parts, moe_parts
from support.quantised_cases import quantised
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.quantised import Bits, Weight
from dsc_kernels.weights import DecoderLayer, KvCache, LayerOutputs, NormWeights, Slots

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]

BLOCK = 16
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["dense", "dsc", "moe"]


class Made:
    """Layers of random weights and the inputs of a step: single tokens first, then chunks."""

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype,
        decodes: int,
        chunks: list[int],
        d: int,
        size: int,
        plainly: bool = False,
        bits: Bits | None = None,
    ) -> None:
        self.bits = bits
        self.generator = torch.Generator().manual_seed(decodes + d)
        self.dtype, self.heads, self.kv_heads, self.size = dtype, 4, 2, size
        self.cos_sin_cache = None if plainly else self.random(64, 2, size // 2).float()
        self.layers = [self.layer(kind, d, plainly) for _ in range(2)]
        sequences, tokens = decodes + len(chunks), decodes + sum(chunks)
        self.decodes, self.ids = decodes, torch.randint(50, (tokens,), generator=self.generator)
        self.token_embedding, self.position_embedding = (
            self.weight(50, d, bits=bits),
            None if plainly else self.random(64, d),
        )
        contexts = [1 + 7 * i % 40 for i in range(decodes)] + [length + 9 * i for i, length in enumerate(chunks)]
        self.contexts = torch.tensor(contexts)
        self.max_context_len = max(contexts[:decodes], default=0)
        self.tables = torch.randperm(4 * sequences, generator=self.generator).view(sequences, 4)
        starts = [decodes + sum(chunks[:i]) for i in range(len(chunks))]
        self.chunks = [(decodes + i, starts[i], chunks[i], contexts[decodes + i]) for i in range(len(chunks))]
        rows = [(i, contexts[i] - 1) for i in range(decodes)]
        rows += [(row, context - length + j) for row, _, length, context in self.chunks for j in range(length)]
        owners, positions = torch.tensor(rows).unbind(1)
        self.slots = Slots(positions.contiguous(), self.tables[owners, positions // BLOCK], positions % BLOCK)
        shape = (4 * sequences, self.kv_heads, BLOCK, size)
        self.kv_caches = [KvCache(self.random(*shape), self.random(*shape)) for _ in self.layers]

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5).to(self.dtype)

    def weight(self, *shape: int, bits: Bits | None = None) -> Weight:
        if self.bits is None:
            return self.random(*shape)
        return quantised(self.generator, *shape, bits or self.bits, dtype=self.dtype, rank=0 if bits else 3)

    def norm(self, d: int, plainly: bool) -> NormWeights:
        return NormWeights(1 + self.random(d), None if plainly else self.random(d), 1e-5)

    def layer(self, kind: str, d: int, plainly: bool) -> DecoderLayer:
        width = (self.heads + 2 * self.kv_heads) * self.size
        qkv = native.Linear(self.weight(width, d), None if plainly else self.random(width))
        out = native.Linear(self.weight(d, self.heads * self.size), None if plainly else self.random(d))
        norms = self.norm(d, plainly), self.norm(d, plainly)
        return DecoderLayer(
            attention_norm=norms[0],
            qkv=qkv,
            out=out,
            heads=self.heads,
            kv_heads=self.kv_heads,
            cos_sin_cache=self.cos_sin_cache,
            ffn_norm=norms[1],
            ffn=self.ffn(kind, d, plainly),
        )

    def ffn(self, kind: str, d: int, plainly: bool) -> native.Ffn | native.Moe:
        hidden, gate = 24, None if plainly else self.weight(24, d)
        up, down = self.weight(hidden, d), self.weight(d, hidden)
        if kind == "dense":
            return native.Ffn(**ffn_parts(up, gate, down, "silu"))
        if kind == "moe":
            experts = [[self.weight(hidden, d) for _ in range(3)] for _ in range(2)]
            downs = [self.weight(d, hidden) for _ in range(3)]
            gates = None if plainly else experts[1]
            matrices = experts[0], gates, downs
            return native.Moe(**moe_parts(self.weight(3, d, bits=8), None, *matrices, 1e-5, activation="gelu", k=2))
        atoms = 40
        bank = self.weight(atoms, d, bits=8), self.weight(atoms, d, bits=8)
        routed = (self.weight(atoms, d, bits=8), None, *bank, torch.ones(d))
        return native.Ffn(**ffn_parts(up, gate, down, "gelu", *routed, k=4, tau=20, eps=1e-6))

    def stack(self) -> native.Stack:
        return native.Stack(self.token_embedding, self.position_embedding, self.layers)

    @property
    def x(self) -> Tensor:
        tokens = ops.embed(self.token_embedding, self.ids)
        return tokens if self.position_embedding is None else tokens + self.position_embedding[self.slots[0]]

    def in_one_call(self, stack: native.Stack, outputs: list[LayerOutputs] | None = None) -> Tensor:
        inputs = self.ids, self.slots, self.tables, self.contexts, self.decodes, self.max_context_len, self.chunks
        return stack(*inputs, self.kv_caches, outputs)

    def layer_by_layer(self) -> Tensor:
        x, n, scale = self.x, self.decodes, self.size**-0.5
        for b, cache in zip(self.layers, self.kv_caches, strict=True):
            rows = b.qkv(native.norm(x, b.attention_norm)).view(x.shape[0], -1, self.size)
            native.store_kv(rows, self.heads, self.cos_sin_cache, self.slots, cache)
            q, y = rows[:, : self.heads], torch.empty(x.shape[0], self.heads, self.size, dtype=self.dtype)
            contexts = self.contexts[:n]
            if n:
                tables = self.tables[:n]
                y[:n] = native.decode_attention(q[:n], cache, tables, contexts, self.max_context_len, scale)
            for row, start, length, context in self.chunks:
                own = slice(start, start + length)
                y[own] = native.chunk_attention(q[own], cache, self.tables[row], context, scale)
            x = b.out(y.flatten(1), residual=x)
            x = b.ffn(native.norm(x, b.ffn_norm), residual=x)
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    ("decodes", "chunks", "d", "size", "plainly"),
    [(1, [], 48, 16, False), (5, [3, 17], 33, 32, False), (0, [30], 40, 20, True), (27, [2], 64, 64, True)],
)
def test_layers_in_one_call_equal_one_by_one(
    kind: str,
    dtype: torch.dtype,
    decodes: int,
    chunks: list[int],
    d: int,
    size: int,
    plainly: bool,
    bits: Bits | None,
) -> None:
    """plainly: without biases, turned heads and gates; bits: of all weights, the embedding's too."""
    made = Made(kind, dtype, decodes, chunks, d, size, plainly, bits)
    before = [KvCache(keys.clone(), values.clone()) for keys, values in made.kv_caches]
    want = made.layer_by_layer()
    made.kv_caches, written = before, made.kv_caches
    got = made.in_one_call(made.stack())
    assert torch.equal(got, want)
    for pair, expected in zip(made.kv_caches, written, strict=True):
        assert all(torch.equal(*parts) for parts in zip(pair, expected, strict=True))


def test_an_embedding_with_a_compensation_is_the_sum_of_both() -> None:
    made = Made("dense", torch.float32, 5, [3], 40, 16, bits=4)
    weight = quantised(made.generator, 50, 40, dtype=torch.float32, rank=3)
    made.token_embedding = weight
    got = made.in_one_call(made.stack())
    made.token_embedding = weight.whole()
    torch.testing.assert_close(got, made.in_one_call(made.stack()), rtol=2e-2, atol=2e-2)
    made.token_embedding = weight.dequantise()
    assert not torch.allclose(got, made.in_one_call(made.stack()), rtol=2e-2, atol=2e-2)


def test_picks_are_those_of_the_layer() -> None:
    made = Made("dsc", torch.float32, 6, [], 48, 16)
    del made.layers[1:], made.kv_caches[1:]
    (layer,), (cache,) = made.layers, made.kv_caches
    outputs = LayerOutputs.everything(6, 4)
    got = made.in_one_call(made.stack(), [outputs])
    assert torch.equal(got, made.in_one_call(made.stack()))
    assert isinstance(layer.ffn, native.Ffn)
    rows = layer.qkv(native.norm(made.x, layer.attention_norm)).view(6, -1, 16)
    native.store_kv(rows, made.heads, made.cos_sin_cache, made.slots, cache)
    q = rows[:, : made.heads]
    y = native.decode_attention(q, cache, made.tables, made.contexts, made.max_context_len, 0.25)
    middle = layer.out(y.flatten(1), residual=made.x)
    _, *picked = layer.ffn.routed(native.norm(middle, layer.ffn_norm))
    assert all(torch.equal(a, b) for a, b in zip(outputs.picked, picked, strict=True))


@pytest.mark.parametrize("tokens", [7, 40])
def test_grouping_changes_no_bit(tokens: int) -> None:
    made = Made("dsc", torch.float32, tokens, [], 48, 16)
    assert torch.equal(made.in_one_call(made.stack()), made.in_one_call(made.stack(), 2 * [LayerOutputs(grouped=True)]))


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
    phases = native.kernels.STACK_PHASES
    assert set(spent) == {*phases, *native.kernels.FFN_PHASES}
    assert all(spent[name] > 0 for name in phases)
    assert sum(spent[name] for name in phases) <= taken
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
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize(("token", "spoilt"), [(2, [2]), (6, [6, 7]), (16, list(range(16, 25)))])
def test_a_token_that_is_no_number_spoils_only_what_sees_it(
    kind: str, dtype: torch.dtype, size: int, token: int, spoilt: list[int]
) -> None:
    made = Made(kind, dtype, 5, [3, 17], 48, size)
    made.ids = torch.randperm(50, generator=made.generator)[:25]
    stack = made.stack()
    clean = made.in_one_call(stack)
    made.token_embedding[made.ids[token]] = torch.nan
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
    count, outputs = len(made.kv_caches[0][0]), LayerOutputs.everything(5, 4)
    strided = made.kv_caches[0][0].transpose(0, 1).contiguous().transpose(0, 1)
    cases: list[tuple[str, dict[str, object]]] = [
        ("single tokens and chunks are 2 tokens, but there are 5", {"chunks": []}),
        ("chunk 0 .* does not fit", {"chunks": [(2, 2, 3, 65)]}),
        ("chunk 0 .* does not fit", {"chunks": [(2, 2, 4, 3)]}),
        ("chunk 0 .* does not fit", {"chunks": [(3, 2, 3, 9)]}),
        ("chunk 0 .* does not fit", {"chunks": [(2, 1, 3, 9)]}),
        ("chunk 1 .* does not fit", {"chunks": [(2, 2, 3, 9), (2, 5, 0, 9)]}),
        ("do not hold contexts of 65", {"max_context_len": 65}),
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
        ("KV caches of 1 layers", {"kv_caches": made.kv_caches[:1]}),
        ("a KV cache is", {"kv_caches": [made.kv_caches[0], (made.kv_caches[1][0], made.kv_caches[1][1][:, :, :8])]}),
        ("a KV cache must be contiguous", {"kv_caches": 2 * [(strided, strided)]}),
        ("outputs of 1 layers", {"outputs": [outputs]}),
        ("picks is", {"outputs": 2 * [outputs._replace(picks=torch.empty(4, 4, dtype=torch.int32))]}),
        ("weights is", {"outputs": 2 * [outputs._replace(weights=torch.empty(5, 3))]}),
    ]
    given: dict[str, object] = {"ids": made.ids, "slots": made.slots, "tables": tables, "contexts": contexts}
    given |= {"decodes": 2, "max_context_len": made.max_context_len, "chunks": made.chunks}
    given |= {"kv_caches": made.kv_caches, "outputs": 2 * [outputs]}
    want = stack(**given)
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            stack(**{**given, **wrong})
    assert torch.equal(stack(**given), want)
    dense = Made("dense", torch.float32, 2, [3], 48, 16)
    with pytest.raises(ValueError, match="picks nothing"):
        dense.in_one_call(dense.stack(), 2 * [LayerOutputs(grouped=True)])
    mixture = Made("moe", torch.float32, 2, [3], 48, 16)
    for wrong in (LayerOutputs(grouped=True), LayerOutputs(signal=torch.empty(5))):
        with pytest.raises(ValueError, match="a mixture of experts has no signal"):
            mixture.in_one_call(mixture.stack(), 2 * [wrong])
    with pytest.raises(ValueError, match="picks is"):
        mixture.in_one_call(mixture.stack(), 2 * [LayerOutputs(picks=torch.empty(4, 2, dtype=torch.int32))])


def test_layers_that_do_not_fit_are_refused() -> None:
    made, narrow = Made("dense", torch.float32, 2, [3], 48, 16), Made("dense", torch.bfloat16, 2, [3], 48, 16)
    layer = made.layers[0]
    wide = native.Linear(torch.zeros(12 * 16, 48))
    for message, wrong in [
        ("a norm's vector", {"attention_norm": NormWeights(torch.ones(47), None, 1e-5)}),
        ("3 heads, 2 for keys; the first layer has 4, 2", {"heads": 3}),
        ("4 heads, 4 for keys; the first layer has 4, 2", {"kv_heads": 4, "qkv": wide}),
        ("projections .* do not fit", {"qkv": wide}),
        ("parts of a layer are", {"ffn": narrow.layers[0].ffn}),
        ("cos_sin_cache turns 18 numbers", {"cos_sin_cache": torch.zeros(64, 2, 9)}),
    ]:
        with pytest.raises(ValueError, match=message):
            native.Stack(made.token_embedding, None, [layer, replace(layer, **wrong)])
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3"):
        native.Stack(made.token_embedding, None, [replace(layer, kv_heads=3)])
