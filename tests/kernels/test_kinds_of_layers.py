"""Layers of every kind in one call: the same bits as part by part, and what the oracle computes in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from test_stack import Made
from torch import Tensor

from dsc_kernels import native, plain, reference
from dsc_kernels.weights import (
    DecoderLayer,
    FfnOptions,
    KvCache,
    MlpWeights,
    MoeOptions,
    NormPlaces,
    NormWeights,
    QkNorm,
    Router,
    SharedExpert,
    Slots,
)

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]

PLACES: tuple[NormPlaces, ...] = ("before", "after", "parallel", "shared")
SHAPES = [(1, [], 48, 16), (5, [3, 17], 33, 20), (27, [2], 64, 32)]  # decodes, chunks, width, head size
FFNS = ("dense", "biased", "moe", "shared")
EPS = 1e-5


class Varied(Made):
    """Two layers: the first as told, the second one turns nothing, has no norms of heads, and a plain FFN."""

    def __init__(
        self,
        norms: NormPlaces,
        qk_norm: str,
        turned: int,
        ffn: str,
        dtype: torch.dtype,
        decodes: int,
        chunks: list[int],
        d: int,
        size: int,
    ) -> None:
        self.raw: list[dict[str, Any]] = []
        self.norms, self.qk, self.turned, self.activation = norms, qk_norm, turned, "gelu_tanh"
        super().__init__(ffn, dtype, decodes, chunks, d, size)

    def layer(self, kind: str, d: int, plainly: bool) -> DecoderLayer:
        first, width = not self.raw, (self.heads + 2 * self.kv_heads) * self.size
        raw: dict[str, Any] = {"qkv": self.random(width, d), "out": self.random(d, self.heads * self.size)}
        raw["norm1"], raw["norm2"] = 1 + self.random(d), 1 + self.random(d)
        raw["bias"] = self.random(width)
        raw["cos_sin"] = self.random(64, 2, self.turned // 2).float() if first and self.turned else None
        raw["q"] = raw["k"] = None
        if first and self.qk != "none":
            together = self.qk == "all"
            sizes = (self.heads, self.kv_heads) if together else (1, 1)
            raw["q"], raw["k"] = (1 + self.random(n * self.size) for n in sizes)
        self.raw.append(raw)
        return DecoderLayer(
            norms=self.norms,
            attention_norm=NormWeights(raw["norm1"], None, EPS),
            qkv=native.Linear(raw["qkv"], raw["bias"]),
            out=native.Linear(raw["out"]),
            heads=self.heads,
            kv_heads=self.kv_heads,
            qk_norm=None if raw["q"] is None else QkNorm(raw["q"], raw["k"], EPS),
            cos_sin_cache=raw["cos_sin"],
            ffn_norm=NormWeights(raw["norm2"], None, EPS),
            ffn=self.made_ffn(kind if first else "dense", d, raw),
        )

    def made_ffn(self, kind: str, d: int, raw: dict[str, Any]) -> native.Ffn | native.Moe:
        hidden = 23

        def mlp(size: int) -> list[Tensor]:
            return [self.random(size, d), self.random(size, d), self.random(d, size)]

        raw["kind"] = kind
        if kind in ("dense", "biased"):
            raw["mlp"] = mlp(hidden)
            raw["biases"] = [self.random(n) if kind == "biased" else None for n in (hidden, hidden, d)]
            return native.Ffn(MlpWeights(*raw["mlp"], *raw["biases"]), FfnOptions(activation="gelu_tanh"))
        raw["router"], raw["experts"] = self.random(6, d), [mlp(hidden) for _ in range(6)]
        raw["shared"] = (mlp(37), self.random(d)) if kind == "shared" else None
        shared = None if raw["shared"] is None else SharedExpert(MlpWeights(*raw["shared"][0]), raw["shared"][1])
        experts = [MlpWeights(*expert) for expert in raw["experts"]]
        options = MoeOptions(activation="gelu_tanh", k=2, normalize=kind == "shared")
        return native.Moe(Router(raw["router"]), experts, options, shared)

    def part_by_part(self) -> Tensor:
        x = self.x
        for layer, cache in zip(self.layers, self.kv_caches, strict=True):

            def attention(h: Tensor, residual: Tensor | None, b: DecoderLayer = layer, c: KvCache = cache) -> Tensor:
                rows = b.qkv(h).view(len(h), -1, self.size)
                native.store_kv(rows, self.heads, b.cos_sin_cache, self.slots, c, b.qk_norm)
                return b.out(self.attended(rows[:, : self.heads], c).flatten(1), residual=residual)

            norms = [lambda h, r=None, w=w: native.norm(h, w, r) for w in (layer.attention_norm, layer.ffn_norm)]
            x = arranged(self.norms, x, *norms, attention, layer.ffn)
        return x

    def attended(self, q: Tensor, cache: KvCache) -> Tensor:
        n, scale = self.decodes, self.size**-0.5
        y = torch.empty(len(q), self.heads, self.size, dtype=self.dtype)
        if n:
            contexts = self.contexts[:n]
            y[:n] = native.decode_attention(q[:n], cache, self.tables[:n], contexts, self.max_context_len, scale)
        for row, start, length, context in self.chunks:
            own = slice(start, start + length)
            y[own] = native.chunk_attention(q[own], cache, self.tables[row], context, scale)
        return y

    def oracle(self) -> Tensor:
        """The same in float64."""
        x = self.x.double()
        owners = list(range(self.decodes)) + [row for row, _, length, _ in self.chunks for _ in range(length)]
        for raw, cache in zip(self.raw, self.kv_caches, strict=True):
            w = {k: v.double() if isinstance(v, Tensor) else v for k, v in raw.items()}
            keys, values = (part.double() for part in cache)
            cos_sin = None if w["cos_sin"] is None else w["cos_sin"][self.slots.positions]

            def attention(
                h: Tensor,
                residual: Tensor | None,
                w: dict[str, Any] = w,
                pools: tuple[Tensor, Tensor] = (keys, values),
                cos_sin: Tensor | None = cos_sin,
            ) -> Tensor:
                rows = (h @ w["qkv"].T + w["bias"]).view(len(h), -1, self.size)
                q, k, v = rows.tensor_split((self.heads, self.heads + self.kv_heads), dim=1)
                q = reference.prepared_heads(q, w["q"], EPS, cos_sin)
                pools[0][self.slots.blocks, :, self.slots.offsets] = reference.prepared_heads(k, w["k"], EPS, cos_sin)
                pools[1][self.slots.blocks, :, self.slots.offsets] = v
                seen = self.slots.positions + 1
                args = self.tables[owners], seen, int(seen.max()), self.size**-0.5
                out = reference.decode_attention(q, *pools, *args).flatten(1) @ w["out"].T
                return out if residual is None else out + residual

            def ffn(h: Tensor, residual: Tensor | None = None, w: dict[str, Any] = w) -> Tensor:
                out = oracle_ffn(h, w)
                return out if residual is None else out + residual

            norms = [
                lambda h, r=None, g=g: reference.norm(h, g, None, EPS) + (0 if r is None else r)
                for g in (w["norm1"], w["norm2"])
            ]
            x = arranged(self.norms, x, *norms, attention, ffn)
        return x


def oracle_ffn(h: Tensor, w: dict[str, Any]) -> Tensor:
    if "mlp" in w:
        up, gate, down = (m.double() for m in w["mlp"])
        b = [0 if bias is None else bias.double() for bias in w["biases"]]
        inner = reference.ACTIVATIONS["gelu_tanh"](h @ gate.T + b[1]) * (h @ up.T + b[0])
        return inner @ down.T + b[2]
    up, gate, down = (torch.stack(part).double() for part in zip(*w["experts"], strict=True))
    shared = None if w["shared"] is None else tuple(m.double() for m in w["shared"][0])
    scale = None if w["shared"] is None else w["shared"][1].double()
    normalize = shared is not None
    matrices = w["router"], None, up, gate, down
    return reference.moe_layer(h, None, *matrices, "gelu_tanh", 2, normalize, None, shared, scale)


def arranged(
    places: str,
    x: Tensor,
    norm1: Callable[..., Tensor],
    norm2: Callable[..., Tensor],
    attention: Callable[..., Tensor],
    ffn: Callable[..., Tensor],
) -> Tensor:
    if places == "after":
        x = norm1(attention(x, None), x)
        return norm2(ffn(x), x)
    normed = norm1(x)
    y = attention(normed, x)
    fed = {"before": lambda: norm2(y), "parallel": lambda: norm2(x), "shared": lambda: normed}[places]()
    return ffn(fed, residual=y)


KINDS = [
    *((("before", qk, turned, "dense"), SHAPES[1]) for qk, turned in product(("none", "head", "all"), (0, 6, 20))),
    *(((places, "head", 8, ffn), shape) for places, ffn, shape in product(PLACES, FFNS, (SHAPES[0], SHAPES[1]))),
    (("after", "all", 32, "shared"), SHAPES[2]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "shape"), KINDS, ids=str)
def test_layers_of_each_kind_in_one_call(
    case: tuple[NormPlaces, str, int, str], shape: tuple[int, list[int], int, int], dtype: torch.dtype
) -> None:
    made = Varied(*case, dtype, *shape)
    before = [KvCache(keys.clone(), values.clone()) for keys, values in made.kv_caches]
    want = made.part_by_part()
    written, made.kv_caches = made.kv_caches, before
    exact = made.oracle() if dtype == torch.float32 else None
    got = made.in_one_call(made.stack())
    assert torch.equal(got, want)
    for pair, expected in zip(made.kv_caches, written, strict=True):
        assert all(torch.equal(*parts) for parts in zip(pair, expected, strict=True))
    assert exact is None or float((got.double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("batch", "d", "hidden", "experts", "k", "shared"),
    [
        (1, 33, 7, 64, 8, 50),
        (24, 40, 16, 60, 4, 65),
        (25, 17, 9, 32, 8, 1),
        (230, 48, 21, 8, 2, 96),
        (3, 64, 5, 4, 4, 0),
    ],
)
def test_many_small_experts_and_a_shared_one(
    batch: int, d: int, hidden: int, experts: int, k: int, shared: int, normalize: bool, gated: bool, dtype: torch.dtype
) -> None:
    """shared: the width of the expert that all tokens share, 0 for none. Odd widths, and both ways of sharing work."""
    g = torch.Generator().manual_seed(d)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    def mlp(size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        return random(size, d), random(size, d) if gated else None, random(d, size)

    matrices, router = [mlp(hidden) for _ in range(experts)], random(experts, d)
    own, scale = (mlp(shared), random(d)) if shared else (None, None)
    x, residual = (4 * random(batch, d)).to(dtype), random(batch, d)
    options = MoeOptions(activation="silu", k=k, normalize=normalize)
    parts = None if own is None else SharedExpert(MlpWeights(*own), scale)
    made = Router(router), [MlpWeights(*m) for m in matrices], options, parts
    got = native.Moe(*made)(x, residual)

    up, gate, down = ([None if w is None else w.double() for w in part] for part in zip(*matrices, strict=True))
    wide = torch.stack(up), torch.stack(gate) if gated else None, torch.stack(down)
    its = None if own is None else tuple(None if w is None else w.double() for w in own)
    last = (normalize, None, its, None if scale is None else scale.double())
    want = reference.moe_layer(x.double(), residual.double(), router.double(), None, *wide, "silu", k, *last)
    logits = (x.double() @ router.double().T).sort(dim=1, descending=True).values
    sure = logits[:, k - 1] - logits[:, k] > 1e-3 if k < experts else torch.ones(batch, dtype=torch.bool)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert bool(sure.any())
    assert float((got[sure].double() - want[sure]).norm() / want[sure].norm()) < limit
    plainly = plain.Moe(*made)(x, residual)
    assert float((plainly[sure].double() - want[sure]).norm() / want[sure].norm()) < limit


def test_what_does_not_fit_is_refused() -> None:
    qkv, cache = torch.zeros(2, 4, 8), KvCache(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    slots = Slots(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    for message, norm in (
        ("the norm of queries is", QkNorm(torch.ones(7), torch.ones(8), EPS)),
        ("the norm of keys is", QkNorm(torch.ones(16), torch.ones(16), EPS)),
        ("the norm of queries is", QkNorm(torch.ones(8).bfloat16(), torch.ones(8), EPS)),
    ):
        with pytest.raises(ValueError, match=message):
            native.store_kv(qkv, 2, None, slots, cache, norm)
    with pytest.raises(ValueError, match="turns 10 numbers of each head; there are 8"):
        native.store_kv(qkv, 2, torch.zeros(4, 2, 5), slots, cache)
    one = MlpWeights(torch.zeros(5, 8), None, torch.zeros(8, 5))
    gated = MlpWeights(torch.zeros(5, 8), torch.zeros(5, 8), torch.zeros(8, 5))
    options = MoeOptions(activation="silu", k=1)
    for message, experts, shared in (
        ("must all have a gate, or none", [one], SharedExpert(gated)),
        ("the shared expert's gate is", [one], SharedExpert(one, torch.zeros(7))),
        ("down of the shared expert is", [one], SharedExpert(MlpWeights(one.up, None, torch.zeros(8, 6)))),
        ("an expert has a bias", [MlpWeights(one.up, None, one.down, torch.zeros(5))], None),
    ):
        with pytest.raises(ValueError, match=message):
            native.Moe(Router(torch.zeros(1, 8)), experts, options, shared)
    biased = MlpWeights(one.up, None, one.down, gate_bias=torch.zeros(5))
    with pytest.raises(ValueError, match="a bias of a gate, but no gate"):
        native.Ffn(biased, FfnOptions(activation="silu"))
    with pytest.raises(ValueError, match="residual is"):
        native.norm(torch.zeros(2, 8), NormWeights(torch.ones(8), None, EPS), torch.zeros(2, 7))


def test_poison_beside_a_shared_expert_stays_where_it_is() -> None:
    """A token that is not finite spoils no other."""
    g = torch.Generator().manual_seed(3)
    weights = [MlpWeights(*(torch.randn(*s, generator=g) for s in ((5, 8), (5, 8), (8, 5)))) for _ in range(5)]
    layer = native.Moe(
        Router(torch.randn(4, 8, generator=g)),
        weights[:4],
        MoeOptions(activation="silu", k=2, normalize=True),
        SharedExpert(weights[4], torch.randn(8, generator=g)),
    )
    for batch in (5, 40):
        x = torch.randn(batch, 8, generator=g)
        clean = layer(x)
        x[2, 3] = torch.nan
        others = torch.arange(batch) != 2
        spoilt = layer(x)
        assert bool(spoilt[2].isnan().all()) and torch.equal(spoilt[others], clean[others])
