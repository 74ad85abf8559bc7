"""The mixture of experts against a float64 loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.honest import DTYPES, MOST_DTYPES, Poisoned, banded, error, poisoned, random
from support.quantised_cases import exact, quantised
from torch import Tensor

from dsc_kernels import plain, reference
from dsc_kernels.gpu import add_norm, ffn_in, layers, moe, pick_experts, place_slots, route_experts, select
from dsc_kernels.gpu import quantised as narrow
from dsc_kernels.plain import ACTIVATIONS
from dsc_kernels.quantised import QuantisedWeight
from dsc_kernels.weights import Activation, LayerOutputs, MlpWeights, MoeOptions, NormWeights, Router, SharedExpert

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poisoned]:
    stand_in = poisoned(monkeypatch, moe, route_experts, pick_experts, place_slots, select, add_norm, ffn_in)
    yield stand_in
    stand_in.check()


def oracle(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    act, out = ACTIVATIONS[activation], []
    for token, row in enumerate(x.double()):
        total = torch.zeros_like(row) if residual is None else residual[token].double()
        for weight, expert in zip(weights[token].double(), experts[token].tolist(), strict=True):
            middle = row @ up[expert].double().T
            middle = act(middle) if gate is None else act(row @ gate[expert].double().T) * middle
            total = total + weight * (middle @ down[expert].double().T)
        out.append(total)
    return torch.stack(out)


def run_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
    residual: Tensor | None = None,
    shared: moe.SharedBeside | None = None,
) -> Tensor:
    """The slots of all tokens, summed as a layer does."""
    slots = moe.expert_slots(x, weights, experts.int(), up, gate, down, activation, shared)
    k, d = slots.shape[1:]
    return add_norm.summed(residual, add_norm.Parts(slots, k, d, k * d), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "d", "hidden", "count", "k", "activation", "options"),
    [
        (1, 1, 1, 1, 1, "gelu", (False, False)),
        (9, 67, 41, 5, 2, "gelu", (False, True)),
        (23, 48, 70, 3, 3, "silu", (True, False)),
        (70, 33, 50, 2, 2, "gelu", (True, True)),
        (3, 20, 16, 200, 4, "none", (False, False)),
    ],
)
def test_experts(
    dtype: torch.dtype,
    batch: int,
    d: int,
    hidden: int,
    count: int,
    k: int,
    activation: Activation,
    options: tuple[bool, bool],
) -> None:
    gated, with_residual = options
    g = torch.Generator().manual_seed(batch + hidden)
    x, up = random(g, dtype, batch, d), random(g, dtype, count, hidden, d, scale=d**-0.5)
    gate = random(g, dtype, count, hidden, d, scale=d**-0.5) if gated else None
    down = random(g, dtype, count, d, hidden, scale=hidden**-0.5)
    residual = random(g, dtype, batch, d) if with_residual else None
    weights = banded(torch.rand(batch, k, generator=g))
    experts = torch.stack([torch.randperm(count, generator=g)[:k] for _ in range(batch)])
    got = run_experts(x, weights, experts, up, gate, down, activation, residual)
    want = oracle(x, weights, experts, up, gate, down, activation, residual)
    assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(("batch", "count", "k"), [(9, 5, 2), (70, 2, 2)])
def test_experts_whose_slots_are_sorted(
    dtype: torch.dtype, batch: int, count: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of many tokens are."""
    monkeypatch.setattr(moe, "DIRECT_SLOTS", 0)
    test_experts(dtype, batch, 33, 50, count, k, "silu", (True, True))


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(("batch", "count", "k", "sorts"), [(1, 3, 1, False), (21, 20, 4, False), (70, 2, 1, True)])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_shared_expert_beside_the_others(
    dtype: torch.dtype, batch: int, count: int, k: int, sorts: bool, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "DIRECT_SLOTS", 0 if sorts else moe.DIRECT_SLOTS)
    g, d, hidden, width = torch.Generator().manual_seed(batch), 40, 24, 70
    x = random(g, dtype, batch, d)
    up, gate = (random(g, dtype, count, hidden, d, scale=d**-0.5) for _ in range(2))
    down = random(g, dtype, count, d, hidden, scale=hidden**-0.5)
    own = MlpWeights(*(random(g, dtype, width, d, scale=d**-0.5) for _ in range(2)), random(g, dtype, d, width))
    weights, scales = banded(torch.rand(batch, k, generator=g)), banded(torch.rand(batch, generator=g))
    experts = torch.stack([torch.randperm(count, generator=g)[:k] for _ in range(batch)])
    beside = moe.SharedBeside(own, scales if weighed else None)
    got = run_experts(x, weights, experts, up, gate, down, "silu", shared=beside)
    alone = reference.mlp(x.double(), own.up.double(), own.gate.double(), own.down.double(), "silu")
    alone = alone * scales.double()[:, None] if weighed else alone
    want = oracle(x, weights, experts, up, gate, down, "silu", alone)
    assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("crowd", ["all tokens on the last expert", "the first expert alone idle"])
@pytest.mark.parametrize("sorts", [False, True])
def test_uneven_routing(crowd: str, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "DIRECT_SLOTS", 0 if sorts else moe.DIRECT_SLOTS)
    g = torch.Generator().manual_seed(0)
    x, up = random(g, torch.float32, 35, 20), random(g, torch.float32, 4, 24, 20)
    down, weights = random(g, torch.float32, 4, 20, 24), banded(torch.rand(35, 1, generator=g))
    experts = torch.full((35, 1), 3) if crowd.startswith("all") else torch.arange(35)[:, None] % 3 + 1
    got = run_experts(x, weights, experts, up, None, down, "gelu")
    assert error(got, oracle(x, weights, experts, up, None, down, "gelu", None)) < TOLERANCE[torch.float32]


def test_a_bad_token_touches_no_other() -> None:
    g = torch.Generator().manual_seed(0)
    x, up, down = (random(g, torch.bfloat16, *shape) for shape in ((8, 20), (3, 24, 20), (3, 20, 24)))
    weights, experts = torch.rand(8, 2, generator=g), torch.arange(16).view(8, 2) % 3
    clean = run_experts(x, weights, experts, up, None, down, "gelu")
    x[3, 4] = float("nan")
    got = run_experts(x, weights, experts, up, None, down, "gelu")
    others = [i for i in range(8) if i != 3]
    assert torch.equal(got[others], clean[others]) and bool(got[3].isnan().all())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_with_a_shared_expert(gated: bool, activation: Activation) -> None:
    g = torch.Generator().manual_seed(0)

    def mlp(size: int) -> MlpWeights:
        return MlpWeights(*(random(g, torch.float32, *shape) for shape in ((size, 32), (size, 32), (32, size))))

    router, experts = random(g, torch.float32, 5, 32), [mlp(20) for _ in range(5)]
    own, scale = mlp(28), random(g, torch.float32, 32) if gated else None
    x, residual = random(g, torch.float32, 7, 32), random(g, torch.float32, 7, 32)
    options = MoeOptions(activation=activation, k=2, normalize=True)
    got = layers.Moe(Router(router), experts, options, SharedExpert(own, scale))(x, residual)
    wide = (torch.stack([getattr(e, part).double() for e in experts]) for part in ("up", "gate", "down"))
    shared = own.up.double(), None if own.gate is None else own.gate.double(), own.down.double()
    last = None, shared, None if scale is None else scale.double()
    want = reference.moe_layer(x.double(), residual.double(), router.double(), None, *wide, activation, 2, True, *last)
    assert error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("batch", [7, narrow.FEW + 1])
@pytest.mark.parametrize("gated", [False, True])
def test_few_tokens_read_a_quantised_shared_expert_as_it_is(
    gated: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(batch)
    read: list[QuantisedWeight] = []
    multiply = narrow.multiply

    def reading(x: Tensor, weight: QuantisedWeight) -> Tensor:
        read.append(weight)
        return multiply(x, weight)

    monkeypatch.setattr(narrow, "multiply", reading)
    up, gate, down = quantised(g, 28, 32, rank=2), quantised(g, 28, 32, 8), quantised(g, 32, 28)
    experts = [MlpWeights(quantised(g, 20, 32), None, quantised(g, 32, 20)) for _ in range(3)]
    router, scale = random(g, torch.float32, 3, 32), random(g, torch.float32, 32) if gated else None
    x, residual = random(g, torch.float32, batch, 32), random(g, torch.float32, batch, 32)
    layer = layers.Moe(
        Router(router), experts, MoeOptions(activation="silu", k=2), SharedExpert(MlpWeights(up, gate, down), scale)
    )
    got, picks, weights = layer.routed(x, residual)
    own = (torch.nn.functional.silu(exact(x, gate)) * exact(x, up)) @ down.whole(torch.float64).T
    own = own if scale is None else own * (x.double() @ scale.double()).sigmoid()[:, None]
    whole = [
        torch.stack([one.whole(torch.float64) for one in part]) for part in zip(*map(matrices, experts), strict=True)
    ]
    want = oracle(x, weights, picks, whole[0], None, whole[1], "silu", residual.double() + own)
    assert error(got, want) < 1e-5
    assert sorted(map(id, read)) == (sorted(map(id, (up, gate, down))) if batch <= narrow.FEW else [])


def matrices(expert: MlpWeights) -> tuple[QuantisedWeight, QuantisedWeight]:
    assert isinstance(expert.up, QuantisedWeight) and isinstance(expert.down, QuantisedWeight)
    return expert.up, expert.down


@pytest.mark.parametrize(("tokens", "k", "count"), [(3, 2, 5), (70, 4, 130), (1, 1, 1), (300, 1, 3)])
def test_slots_are_sorted_by_expert_and_then_by_token(tokens: int, k: int, count: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    picks = torch.rand(tokens, count, generator=g).topk(k, dim=1).indices.int()
    order, offsets = place_slots.sort_by_expert(banded(picks), count)
    assert torch.equal(order.long(), picks.flatten().long().sort(stable=True).indices)
    assert offsets.tolist() == [0, *picks.flatten().bincount(minlength=count).cumsum(0).tolist()]


PICKING = [
    (5, MoeOptions(activation="silu", k=2)),
    (16, MoeOptions(activation="silu", k=4, normalize=True, weight_scale=2.5)),
    (130, MoeOptions(activation="silu", k=6)),
    (24, MoeOptions(activation="silu", k=4, scoring="sigmoid", groups=6, groups_used=3, group_picks=2)),
    (8, MoeOptions(activation="silu", k=3, groups=4, groups_used=2)),
]


@pytest.mark.parametrize(("experts", "options"), PICKING)
@pytest.mark.parametrize("biased", [False, True])
def test_experts_are_picked_as_the_reference_does(experts: int, options: MoeOptions, biased: bool) -> None:
    g = torch.Generator().manual_seed(experts)
    logits = torch.randn(5, experts, generator=g)
    logits[1, 1:5] = logits[1, 0]  # the first of equals
    bias = random(g, torch.float32, experts) if biased else None
    weights, picked = pick_experts.pick_experts(banded(logits), options, bias)
    want_weights, want = reference.pick_experts(logits.double(), options, None if bias is None else bias.double())
    assert torch.equal(picked.long(), want) and error(weights, want_weights) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_few_experts_are_picked_where_the_norm_is_computed(dtype: torch.dtype, norm_eps: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    x, terms = random(g, dtype, 4, 50), random(g, torch.float32, 2, 4, 50)
    router = Router(random(g, dtype, 5, 50, scale=0.3), random(g, torch.float32, 5), norm_eps)
    norm, options = NormWeights(random(g, dtype, 50), None, 1e-6), MoeOptions(activation="silu", k=2)
    found, (weights, picked), _ = route_experts.norm_and_pick(x, add_norm.Parts.of(terms), norm, router, options)
    apart = add_norm.add_norm(x, add_norm.Parts.of(terms), norm, norm_eps)
    assert torch.equal(found.x, apart.x) and torch.equal(found.normed, apart.normed)
    want = pick_experts.pick_experts(
        ffn_in.router_logits(apart.normed, router.weight, router.bias, torch.inf, apart.rstd)[0], options, None
    )
    assert torch.equal(picked, want[1]) and error(weights, want[0]) < 1e-5


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize(("batch", "experts", "norm_eps", "enough"), [(3, 17, 1e-5, 264), (4, 60, None, 1)])
def test_many_experts_are_scored_where_the_norm_is_computed(
    dtype: torch.dtype, batch: int, experts: int, norm_eps: float | None, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 8 experts of few tokens, of 16 of many."""
    monkeypatch.setattr(route_experts, "ENOUGH_PROGRAMS", enough)
    g, d = torch.Generator().manual_seed(experts), 50
    assert not route_experts.few_experts(experts, d) and route_experts.scored_beside(batch, experts, d)
    x, terms, further = random(g, dtype, batch, d), random(g, torch.float32, 2, batch, d), random(g, dtype, batch, d)
    router = Router(random(g, dtype, experts, d, scale=0.3), random(g, torch.float32, experts), norm_eps)
    norm, options = NormWeights(random(g, dtype, d), None, 1e-6), MoeOptions(activation="silu", k=4)
    parts, gate = add_norm.Parts.of(terms)._replace(further=further), random(g, torch.float32, d)
    weights, picks = banded(torch.zeros(50, 4)), banded(torch.full((50, 4), -1, dtype=torch.int32))
    outputs = LayerOutputs(picks=picks, weights=weights)
    found = route_experts.norm_and_pick(x, parts, norm, router, options, gate, outputs)
    apart = add_norm.add_norm(x, parts, norm, norm_eps)
    assert torch.equal(found.normed.x, apart.x) and torch.equal(found.normed.normed, apart.normed)
    wide = apart.normed.double()
    logits = reference.router_logits(wide, router.weight.double(), router.bias.double(), norm_eps)
    want_weights, want = reference.pick_experts(logits, options)
    assert torch.equal(found.picked[1].long(), want) and error(found.picked[0], want_weights) < 1e-5
    assert found.shared_weights is not None
    assert error(found.shared_weights, (wide @ gate.double()).sigmoid()) < 1e-5
    assert found.picked[1].data_ptr() == picks.data_ptr() and bool((picks[batch:] == -1).all())


MIXTURES = [  # experts, picked, whether there is a shared one and its gate
    (8, 2, None),
    (16, 2, "plain"),
    (32, 4, None),
    (60, 4, "gated"),
    (64, 6, "plain"),
    (64, 8, None),
    (128, 8, None),
]


@pytest.mark.parametrize("batch", [1, pytest.param(17, marks=pytest.mark.full)])
@pytest.mark.parametrize(("count", "k", "own"), MIXTURES)
def test_a_branch_of_a_real_mixture_equals_plain_torch(count: int, k: int, own: str | None, batch: int) -> None:
    """The sum, its norm, the choice and all products, as a stack computes them."""
    g, d, hidden = torch.Generator().manual_seed(count), 48, 32

    def mlp(width: int) -> MlpWeights:
        ups = (random(g, torch.float32, width, d, scale=d**-0.5) for _ in range(2))
        return MlpWeights(*ups, random(g, torch.float32, d, width, scale=width**-0.5))

    experts, router = [mlp(hidden) for _ in range(count)], Router(random(g, torch.float32, count, d))
    shared = None if own is None else SharedExpert(mlp(80), random(g, torch.float32, d) if own == "gated" else None)
    options = MoeOptions(activation="silu", k=k, normalize=count != 60)
    x, terms = random(g, torch.float32, batch, d), random(g, torch.float32, 2, batch, d)
    norm, parts = NormWeights(random(g, torch.float32, d), None, 1e-6), add_norm.Parts.of(terms)
    stream, given = layers.Moe(router, experts, options, shared).after(x, parts, norm)
    assert given.number == k + (own is not None) and given.further is None
    total = x + terms.sum(0)
    want, picks, _ = plain.Moe(router, experts, options, shared).routed(reference.norm(total, norm.weight, None, 1e-6))
    assert error(stream, total) < 1e-6 and picks.shape == (batch, k)
    assert error(add_norm.summed(None, given, torch.float32), want) < 1e-5


def test_no_tokens() -> None:
    none = torch.empty(0, 8)
    arguments = (none, torch.empty(0, 2), torch.empty(0, 2).long(), torch.ones(3, 4, 8), None, torch.ones(3, 8, 4))
    assert run_experts(*arguments, "gelu").shape == (0, 8)


def test_wrong_inputs_are_named() -> None:
    x, experts = torch.ones(2, 8), torch.zeros(2, 1).long()
    with pytest.raises(ValueError, match=r"down is torch.float32 \[3, 4, 8\]; expected torch.float32 \[3, 8, 4\]"):
        run_experts(x, torch.ones(2, 1), experts, torch.ones(3, 4, 8), None, torch.ones(3, 4, 8), "gelu")


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_papers_sizes(dtype: torch.dtype) -> None:
    test_experts(dtype, 64, 384, 545, 5, 2, "gelu", (False, True))
