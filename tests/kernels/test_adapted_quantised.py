"""Adapters of bases whose weights are in 4 and 8 bits: what they add is not rounded with these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import naive_decoder
from support.made_adapters import merged, random_adapter
from support.quantised_cases import bound as product_bound
from support.quantised_cases import exact, quantised
from support.small_models import small_config, wide_tensors
from test_adapted_steps import MODELS, bound, kernels, prompts_of, step
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.native.stack import modules_of
from dsc_kernels.quantised import Bits, Weight
from dsc_kernels.weights import (
    Adapted,
    AdapterRun,
    DecoderLayer,
    FfnOptions,
    KvCache,
    LowRank,
    MlpWeights,
    Module,
    NormWeights,
    Slots,
)
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.rounding import rounded
from dsc_serve.weight_forms import EIGHT_AT_LEAST, part_of

__all__ = ["kernels"]  # a fixture
CPU = torch.device("cpu")
NEAR = 2e-3
ROUNDED = ("embedding", "head", "attention", "mlp", "experts")


def in_fewer_bits(tensors: dict[str, Tensor], bits: Bits) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Weights with products' matrices quantised, and what they then are."""
    stored: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        assert part not in EIGHT_AT_LEAST or part not in ROUNDED
        stored[name] = rounded(tensor, bits) if part in ROUNDED else tensor
    wide = {name: one if isinstance(one, Tensor) else one.whole() for name, one in stored.items()}
    return stored, wide


@pytest.mark.parametrize("lengths", [(1, 1, 1, 2, 3, 2), (1, 1, 1, 9, 30, 22)], ids=["few", "many"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["dense", "dense, odd", "dense, parallel", "moe", "molora"])
def test_sequences_of_one_step_are_as_with_models_of_their_own(
    kernels: str, name: str, bits: Bits, lengths: Sequence[int]
) -> None:
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    stored, wide = in_fewer_bits(wide_tensors(config), bits)
    model = Decoder(config, stored, torch.float32, CPU)
    assert any(held.startswith(f"int{bits}") for held in model.held)
    first, second = random_adapter("a", config, (3, 16, 1), 1), random_adapter("b", config, (0, 17, 40, 2), 2)
    a, b = bound(model, first), bound(model, second)
    both = model.summed([(a, 0.5), (b, -1.25)])
    added = [[], [(first, 1.0)], [(first, 0.5), (second, -1.25)], [(second, 1.0)], [], [(first, 1.0)]]
    prompts = prompts_of(lengths)
    found = step(model, prompts, [None, a, both, b, None, a])
    base = step(model, prompts, [None] * len(prompts))
    for prompt, own, got, without in zip(prompts, added, found, base, strict=True):
        want = naive_decoder.logits(config, merged(config, wide, own), prompt)
        size = float(want.norm())
        assert float((got.double() - want).norm()) < NEAR * size
        if own:
            assert float((without.double() - want).norm()) > 0.2 * size
        elif kernels != "plain":
            assert torch.equal(got, without), "a token without an adapter has the bits of a step without any"


@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 5], ids=["plainly", "compensated"])
def test_what_is_added_is_added_to_the_sums(
    kernels: str, tokens: int, bits: Bits, dtype: torch.dtype, rank: int
) -> None:
    """An MLP of quantised weights and no activation: its last product with an update, to the bound of that product."""
    g = torch.Generator().manual_seed(tokens)
    d, hidden, out = 40, 50, 40
    up = torch.randn(hidden, d, generator=g).to(dtype) / d**0.5
    down = quantised(g, out, hidden, bits, dtype=dtype, rank=rank)
    layer = ops.ffn(MlpWeights(up, None, down), FfnOptions(activation="none"))
    modules = [{"up": Module(hidden, d), "down": Module(out, hidden)}]
    update = LowRank(*(torch.randn(s, generator=g).to(dtype) / s[1] ** 0.5 for s in ((3, hidden), (out, 3))), 0.75)
    adapter = ops.adapter({(0, "down"): update}, modules, dtype, CPU)
    x = torch.randn(tokens, d, generator=g).to(dtype)
    first, count = tokens // 3, max(1, tokens // 2)
    with torch.inference_mode():
        got = layer(x, adapted=Adapted([AdapterRun(adapter, first, count)], 0)).double()
        base = layer(x).double()
    inner = x.double() @ up.double().T
    want = inner @ down.whole(torch.float64).T
    most = product_bound(inner, down)
    if dtype == torch.bfloat16:  # the inner activations and the outputs are rounded
        most = most + 2.0**-7 * (inner.abs() @ down.whole(torch.float64).abs().T + want.abs())
    assert bool(((base - want).abs() <= most + 1e-5).all())
    rows = slice(first, first + count)
    delta = 0.75 * (inner[rows] @ update.down.double().T) @ update.up.double().T
    want[rows] += delta
    if dtype == torch.bfloat16:
        most = most + 2.0**-6 * (1 + want.abs())
    assert bool(((got - want).abs() <= most + 1e-5).all())
    assert float((got - base)[rows].norm()) > 0.5 * float(delta.norm())


def low_rank(g: torch.Generator, rank: int, out: int, into: int, scale: float = 0.75) -> LowRank:
    return LowRank(*(torch.randn(size, generator=g) / size[1] ** 0.5 for size in ((rank, into), (out, rank))), scale)


def added(x: Tensor, update: LowRank) -> Tensor:
    return update.scale * (x.double() @ update.down.double().T) @ update.up.double().T


@pytest.mark.parametrize("tokens", [1, 7, 60, 130])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rank", [0, 5], ids=["plainly", "compensated"])
@pytest.mark.parametrize("names", [("up",), ("gate", "up"), ("gate",)], ids="+".join)
def test_what_is_added_to_first_products_is_added_to_the_sums(
    kernels: str, names: tuple[str, ...], tokens: int, bits: Bits, rank: int
) -> None:
    """The hidden numbers themselves, which a last product by ones shows, to the bound of their own products."""
    g = torch.Generator().manual_seed(tokens)
    d, hidden = 50, 40
    up, gate = (quantised(g, hidden, d, bits, rank=rank) for _ in range(2))
    gated = "gate" in names
    layer = ops.ffn(MlpWeights(up, gate if gated else None, torch.eye(d, hidden)), FfnOptions(activation="none"))
    modules = {name: Module(hidden, d) for name in (("gate", "up") if gated else ("up",))} | {"down": Module(d, hidden)}
    updates = {name: low_rank(g, 3, hidden, d) for name in names}
    adapter = ops.adapter({(0, name): own for name, own in updates.items()}, [modules], torch.float32, CPU)
    x = torch.randn(tokens, d, generator=g)
    first, count = tokens // 3, max(1, tokens // 2)
    rows = slice(first, first + count)
    with torch.inference_mode():
        got = layer(x, adapted=Adapted([AdapterRun(adapter, first, count)], 0)).double()
        base = layer(x).double()
    assert not bool(got[:, hidden:].any())
    wanted = {name: exact(x, weight) for name, weight in (("up", up), ("gate", gate))}
    off = {name: product_bound(x, weight) for name, weight in (("up", up), ("gate", gate))}

    def is_near(found: Tensor) -> bool:
        if not gated:
            return bool(((found[:, :hidden] - wanted["up"]).abs() <= off["up"] + 1e-5).all())
        want = wanted["gate"] * wanted["up"]
        most = wanted["gate"].abs() * off["up"] + wanted["up"].abs() * off["gate"] + off["up"] * off["gate"]
        return bool(((found[:, :hidden] - want).abs() <= most + 1e-5).all())

    assert is_near(base)
    for name, update in updates.items():
        wanted[name][rows] += added(x[rows], update)
    assert is_near(got) and not is_near(base)


class Attending:
    """A layer whose queries, keys and values can be told from what it writes and gives: its MLP adds nothing.

    Single tokens see, before themselves, one key and one value for each of a head's numbers: that number alone, as
    large as `sharp` and as 1. What a query's number is decides how much of that value comes out.
    """

    heads, kv_heads, size, sharp, quiet = 4, 2, 20, 4.0, 1 / 8

    def __init__(self, g: torch.Generator, tokens: int, bits: Bits, rank: int) -> None:
        self.d = self.heads * self.size
        self.parts = [each * self.size for each in (self.heads, self.kv_heads, self.kv_heads)]
        qkv = quantised(g, sum(self.parts), self.d, bits, rank=rank)
        ends = torch.ones(qkv.shape[0], 1)
        ends[self.parts[0] : -self.parts[2]] = self.quiet  # of keys, by which tokens hardly see themselves
        own = None if qkv.compensation is None else (qkv.compensation[0] * ends, qkv.compensation[1])
        assert qkv.minimums is not None
        scales, minimums = (side * ends.half() for side in (qkv.scales, qkv.minimums))
        self.qkv = replace(qkv, scales=scales, minimums=minimums, compensation=own)
        norm = NormWeights(torch.ones(self.d), None, 1e-5)
        nothing = MlpWeights(torch.zeros(16, self.d), None, torch.zeros(self.d, 16))
        self.layer = DecoderLayer(
            attention_norm=norm,
            qkv=native.Linear(self.qkv),
            out=native.Linear(torch.eye(self.d)),
            heads=self.heads,
            kv_heads=self.kv_heads,
            cos_sin_cache=None,
            ffn_norm=norm,
            ffn=native.Ffn(nothing, FfnOptions(activation="gelu")),
        )
        self.x = torch.randn(tokens, self.d, generator=g)
        self.normed = F.rms_norm(self.x.double(), (self.d,), eps=1e-5)
        self.stack = native.Stack(self.x, None, [self.layer])

    def step(self, runs: Sequence[AdapterRun] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """What attention gives [T, heads, size], and keys and values [T, kv_heads, size + 1, size], in float64."""
        tokens = len(self.x)
        seen = torch.eye(self.size + 1, self.size).expand(tokens, self.kv_heads, -1, -1)
        cache = KvCache(seen * self.sharp, seen.clone())
        all_of_them, at = torch.arange(tokens), torch.full((tokens,), self.size)
        slots, tables = Slots(at, all_of_them, at), all_of_them[:, None].contiguous()
        out = self.stack(all_of_them, slots, tables, at + 1, tokens, self.size + 1, (), [cache], runs=runs)
        attended = (out - self.x).double().view(tokens, self.heads, self.size)
        return attended, cache.keys.double(), cache.values.double()

    def are_near(self, found: tuple[Tensor, Tensor, Tensor], products: Tensor) -> dict[str, bool]:
        """Whether queries, keys and values are these products to within the bound of theirs."""
        attended, keys, values = found
        off = product_bound(self.normed, self.qkv) + 1e-5
        (q, k, v), (q_off, k_off, v_off) = (
            [part.unflatten(1, (-1, self.size)) for part in own.split(self.parts, 1)] for own in (products, off)
        )
        group = torch.arange(self.heads) // (self.heads // self.kv_heads)
        keys, values = keys[:, group], values[:, group]
        scale = self.size**-0.5
        scores = torch.einsum("thj,thpj->thp", q, keys) * scale
        rise = torch.expm1(torch.einsum("thj,thpj->thp", q_off, keys.abs()) * scale)  # of a weight, in shares of it
        weights = scores.softmax(-1)
        want = torch.einsum("thp,thpj->thj", weights, values)
        apart = (values - want[:, :, None]).abs()
        most = torch.einsum("thp,thpj->thj", weights * rise, apart) * (1 + rise.amax(-1, keepdim=True)) + 1e-5
        return {
            "q": bool(((attended - want).abs() <= most).all()),
            "k": bool(((found[1][:, :, -1] - k).abs() <= k_off).all()),
            "v": bool(((found[2][:, :, -1] - v).abs() <= v_off).all()),
        }


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rank", [0, 5], ids=["plainly", "compensated"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_added_to_queries_keys_and_values_is_added_to_the_sums(
    instruction_set: str, name: str, tokens: int, bits: Bits, rank: int
) -> None:
    g = torch.Generator().manual_seed(tokens)
    made = Attending(g, tokens, bits, rank)
    modules = modules_of(made.layer)
    update = low_rank(g, 3, modules[name].out, made.d, 0.75 * (made.quiet if name == "k" else 1))
    adapter = ops.adapter({(0, name): update}, [modules], torch.float32, CPU)
    first, count = tokens // 3, max(1, tokens // 2)
    products = made.normed @ made.qkv.whole(torch.float64).T
    with torch.inference_mode():
        base, got = made.step(), made.step([AdapterRun(adapter, first, count)])
    assert all(made.are_near(base, products).values())
    rows, columns = slice(first, first + count), slice(modules[name].at, modules[name].at + modules[name].out)
    products[rows, columns] += added(made.normed[rows], update)
    assert all(made.are_near(got, products).values())
    assert not made.are_near(base, products)[name]
