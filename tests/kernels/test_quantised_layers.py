"""FFN layers of quantised weights against the float64 oracle of the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.native_cases import DTYPES, error, random, routed_layer
from support.quantised_cases import ACTIVATION_BITS, bound, clear_of_ties, emulated, exact, quantised
from torch import Tensor

from dsc_kernels import native, ops, plain, reference
from dsc_kernels.quantised import ActivationBits, Bits, QuantisedWeight
from dsc_kernels.weights import Activation, AtomBank, FfnOptions, MlpWeights, MoeOptions, Router, SharedExpert

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]
# By norm, where inputs and hidden activations are in so many bits, beside those that the dtype has.
WITHIN: dict[tuple[ActivationBits, torch.dtype], float] = {
    (8, torch.float32): 1.5e-2,
    (8, torch.bfloat16): 2.5e-2,
    (16, torch.float32): 6e-5,
    (16, torch.bfloat16): 6e-3,
}
ROUNDING = 3e-6  # of float32, by norm: all that is left beside the same with inputs in int8
BATCHES = [1, 3, 8, 24, 25, 130]


@pytest.fixture(params=["exact", "int8-certified"])
def router_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.router_precision()
    native.use_router(request.param)
    yield request.param
    native.use_router(before)


@pytest.fixture(params=ACTIVATION_BITS, ids=lambda bits: f"int{bits}")
def inputs(request: pytest.FixtureRequest) -> ActivationBits:
    bits: ActivationBits = request.param
    return bits


def mlp(
    g: torch.Generator,
    d: int,
    hidden: int,
    bits: Bits,
    dtype: torch.dtype,
    gated: bool,
    rank: int,
    inputs: ActivationBits = 16,
) -> MlpWeights:
    up, gate = (quantised(g, hidden, d, bits, dtype=dtype, rank=rank, activation_bits=inputs) for _ in range(2))
    down = quantised(g, d, hidden, bits, 16, "centred", dtype, rank, activation_bits=inputs)
    return MlpWeights(up, gate if gated else None, down)


def wide(weights: MlpWeights) -> MlpWeights:
    """The same in float64."""
    up, gate, down = (w.whole(torch.float64) if isinstance(w, QuantisedWeight) else w for w in weights_of(weights))
    assert up is not None and down is not None
    return MlpWeights(up, gate, down)


class InInt8:
    """MLPs number by number as kernels compute them in float32; `clear`: tokens that all would round to one int8."""

    def __init__(self, activation: Activation) -> None:
        self.activation, self.clear = plain.ACTIVATIONS[activation], torch.tensor(True)

    def __call__(self, weights: MlpWeights, x: Tensor) -> Tensor:
        up, gate, down = weights_of(weights)
        hidden = self.activation(emulated(x, up if gate is None else gate))
        hidden = hidden if gate is None else hidden * emulated(x, up)
        self.clear = self.clear & clear_of_ties(x) & clear_of_ties(hidden, 5e-4)
        return emulated(hidden, down)

    def matches(self, got: Tensor, want: Tensor) -> bool:
        """Whether outputs are those, but for tokens that may have been rounded apart; at most half of many may."""
        assert len(got) < 8 or self.clear.float().mean() > 0.4
        return error(got[self.clear], want[self.clear]) < ROUNDING


def weights_of(weights: MlpWeights) -> tuple[Any, Any, Any]:
    return weights.up, weights.gate, weights.down


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "gated", "rank"), [(4, True, 0), (4, False, 5), (8, True, 3), (8, False, 0)])
def test_dense_layer(
    inputs: ActivationBits, bits: Bits, gated: bool, rank: int, dtype: torch.dtype, batch: int
) -> None:
    g = torch.Generator().manual_seed(batch)
    weights = mlp(g, 70, 150, bits, dtype, gated, rank, inputs)
    x, residual = random(g, dtype, batch, 70), random(g, dtype, batch, 70)
    options = FfnOptions(activation="silu")
    want = plain.Ffn(wide(weights), options)(x.double()) + residual.double()
    for backend in (native, plain):
        assert error(backend.Ffn(weights, options)(x, residual), want) < WITHIN[inputs, dtype]
    if inputs == 8 and dtype == torch.float32:
        in_int8 = InInt8("silu")
        assert in_int8.matches(native.Ffn(weights, options)(x, residual), in_int8(weights, x) + residual.double())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", [0, 5])
def test_hidden_numbers_are_within_half_a_step_of_each_input(
    inputs: ActivationBits, gated: bool, bits: Bits, rank: int, batch: int
) -> None:
    """Where a last product by ones shows them, and no activation makes them smaller."""
    g = torch.Generator().manual_seed(batch)
    up, gate = (quantised(g, 61, 70, bits, rank=rank, activation_bits=inputs) for _ in range(2))
    x, show = random(g, torch.float32, batch, 70), torch.eye(70, 61)
    got = native.Ffn(MlpWeights(up, gate if gated else None, show), FfnOptions(activation="none"))(x).double()
    want, most = exact(x, up), bound(x, up)
    if gated:
        other, of_other = exact(x, gate), bound(x, gate)
        most = most * other.abs() + of_other * want.abs() + most * of_other
        want = want * other
    assert bool(((got[:, :61] - want).abs() <= most + 1e-6 * want.abs()).all()) and not bool(got[:, 61:].any())


def routed(
    g: torch.Generator, dtype: torch.dtype, rank: int, inputs: ActivationBits = 16, k: int = 5, atoms: int = 150
) -> dict[str, Any]:
    """A DSC layer or mixture of LoRAs of d 70 with everything in int8, or in int4 where that may be."""
    d, rows = 70, atoms * max(rank, 1)
    layer = routed_layer(g, dtype, d, atoms, k, 90, tau=20.0)
    weights = mlp(g, d, 90, 4, dtype, False, 0, inputs)
    bank = [quantised(g, rows, d, 8, 16, kind, dtype) for kind in ("none", "minimums")]
    router = Router(quantised(g, atoms, d, 8, 32, "none", dtype, size=3.0), layer["router_bias"], 1e-5)
    options = FfnOptions(activation="gelu", k=k, rank=rank, tau=20.0, eps=1e-6)
    return {"mlp": weights, "options": options, "router": router, "bank": AtomBank(*bank, layer["gamma"])}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_routed_layer_picks_by_the_routers_own_numbers(
    router_precision: str, inputs: ActivationBits, rank: int, dtype: torch.dtype, batch: int
) -> None:
    """Picks are those of the float64 router wherever it sees a difference; the output is the oracle's for them."""
    g = torch.Generator().manual_seed(batch + rank)
    parts = routed(g, dtype, rank, inputs)
    x = random(g, dtype, batch, 70)
    layer = native.Ffn(**parts)
    out, picks, weights, _ = layer.routed(x)
    assert layer.screened == (router_precision != "exact" and rank == 0)
    router, bank, k = parts["router"], parts["bank"], parts["options"].k
    logits = reference.router_logits(
        x.double(), router.weight.whole(torch.float64), router.bias.double(), router.norm_eps
    ).clamp(-20, 20)
    ordered = logits.sort(dim=1, descending=True).values
    clear = ordered[:, k - 1] - ordered[:, k] > 1e-4
    assert clear.float().mean() > 0.9 or batch < 9
    wanted = logits.topk(k, dim=1).indices.sort(dim=1).values
    assert torch.equal(picks.long().sort(dim=1).values[clear], wanted[clear])
    rows, spread = picks.long(), weights.double()
    if rank:
        rows = (rows[:, :, None] * rank + torch.arange(rank)).flatten(1)
        spread = spread.repeat_interleave(rank, dim=1)
    static = plain.Ffn(wide(parts["mlp"]), FfnOptions(activation="gelu"))(x.double())
    u, v = bank.u.whole(torch.float64), bank.v.whole(torch.float64)
    composed = reference.compose(x.double(), rows, spread, u, v, bank.gamma.double())
    assert error(out, static + composed) < WITHIN[inputs, dtype]
    if inputs == 8 and dtype == torch.float32:
        in_int8 = InInt8("gelu")
        assert in_int8.matches(out, in_int8(parts["mlp"], x) + composed)


def test_screening_a_quantised_router_changes_no_pick() -> None:
    g = torch.Generator().manual_seed(1)
    parts, x = routed(g, torch.float32, 0), random(g, torch.float32, 40, 70)
    before, found = native.router_precision(), []
    for precision in ("exact", "int8-certified"):
        native.use_router(precision)  # type: ignore[arg-type]
        found.append(native.Ffn(**parts).routed(x)[1])
    native.use_router(before)
    assert torch.equal(*found)


def test_grouped_composition_of_quantised_rows() -> None:
    g = torch.Generator().manual_seed(2)
    layer, x = native.Ffn(**routed(g, torch.float32, 0)), random(g, torch.float32, 40, 70)
    assert torch.equal(layer(x, grouped=True), layer(x))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "hidden", "k", "gated"), [(3, 50, 2, False), (40, 9, 6, True)])
@pytest.mark.parametrize("rank", [0, 2])
def test_mixture_of_experts(
    inputs: ActivationBits, experts: int, hidden: int, k: int, gated: bool, rank: int, dtype: torch.dtype, batch: int
) -> None:
    """Few experts and many small ones, with one that all tokens share."""
    g = torch.Generator().manual_seed(batch)
    d = 70
    made = [mlp(g, d, hidden, 4, dtype, gated, rank, inputs) for _ in range(experts)]
    shared = SharedExpert(mlp(g, d, 33, 8, dtype, gated, 0, inputs), random(g, dtype, d, scale=0.2))
    router = Router(quantised(g, experts, d, 8, 32, "none", dtype, size=3.0), None, 1e-5)
    options = MoeOptions(activation="gelu", k=k, normalize=True)
    x, residual = random(g, dtype, batch, d), random(g, dtype, batch, d)
    got = native.Moe(router, made, options, shared)(x, residual)
    assert isinstance(router.weight, QuantisedWeight)
    as_numbers = replace(router, weight=router.weight.whole(dtype if dtype == torch.float32 else torch.float32))
    assert shared.gate is not None
    wide_shared = SharedExpert(wide(shared.mlp), shared.gate)
    want = mixture(as_numbers, [wide(each) for each in made], options, wide_shared, x, residual)
    assert error(got, want) < WITHIN[inputs, dtype]
    assert error(plain.Moe(router, made, options, shared)(x, residual), want) < WITHIN[inputs, dtype]
    if inputs == 8 and dtype == torch.float32:
        in_int8 = InInt8("gelu")
        assert in_int8.matches(got, mixture(as_numbers, made, options, shared, x, residual, in_int8))


def in_float64(weights: MlpWeights, x: Tensor) -> Tensor:
    return plain.Mlp(weights, "gelu")(x)


def mixture(
    router: Router,
    experts: list[MlpWeights],
    options: MoeOptions,
    shared: SharedExpert,
    x: Tensor,
    residual: Tensor,
    mlp: Callable[[MlpWeights, Tensor], Tensor] = in_float64,
) -> Tensor:
    """In float64, expert by expert."""
    x = x.double()
    assert isinstance(router.weight, Tensor) and shared.gate is not None
    logits = reference.router_logits(x, router.weight.double(), None, router.norm_eps)
    weights, picks = logits.softmax(1).topk(options.k, dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    out = residual.double() + mlp(shared.mlp, x) * (x @ shared.gate.double()).sigmoid()[:, None]
    for e, expert in enumerate(experts):
        own = (weights * (picks == e)).sum(dim=1, keepdim=True)
        out = out + own * mlp(expert, x)
    return out


def test_quantised_and_other_weights_mix_in_one_layer() -> None:
    g = torch.Generator().manual_seed(3)
    weights, x = mlp(g, 70, 90, 4, torch.float32, True, 0), random(g, torch.float32, 30, 70)
    options = FfnOptions(activation="silu")
    want = plain.Ffn(wide(weights), options)(x.double())
    for part in ("up", "gate", "down"):
        mixed = replace(weights, **{part: getattr(weights, part).whole()})
        assert error(ops.ffn(mixed, options)(x), want) < WITHIN[16, torch.float32]


def test_inputs_that_two_weights_share_have_the_digits_that_either_asks_for() -> None:
    g = torch.Generator().manual_seed(5)
    weights, x = mlp(g, 70, 90, 4, torch.float32, True, 0), random(g, torch.float32, 30, 70)
    options = FfnOptions(activation="silu")
    want = plain.Ffn(wide(weights), options)(x.double())
    assert isinstance(weights.up, QuantisedWeight) and isinstance(weights.gate, QuantisedWeight)
    up, gate = (replace(one, activation_bits=8) for one in (weights.up, weights.gate))
    for mixed in (replace(weights, up=up), replace(weights, gate=gate)):
        assert error(native.Ffn(mixed, options)(x), want) < WITHIN[16, torch.float32]
    assert error(native.Ffn(replace(weights, up=up, gate=gate), options)(x), want) > 1e-3


def test_what_layers_do_not_take_is_refused() -> None:
    g = torch.Generator().manual_seed(4)
    parts = routed(g, torch.float32, 0)
    with pytest.raises(ValueError, match="u is quantised to 4 bits; rows read one by one may have 8 alone"):
        native.Ffn(**{**parts, "bank": replace(parts["bank"], u=quantised(g, 150, 70))})
    compensated = quantised(g, 150, 70, 8, rank=2)
    with pytest.raises(ValueError, match="router has a compensation of rank 2"):
        native.Ffn(**{**parts, "router": Router(compensated)})
    with pytest.raises(ValueError, match="v is quantised to 8 bits with a compensation of rank 2"):
        native.Ffn(**{**parts, "bank": replace(parts["bank"], v=compensated)})
    experts = [mlp(g, 32, 16, bits, torch.float32, False, 0) for bits in (4, 8)]
    with pytest.raises(ValueError, match="up: weights of one kind differ"):
        native.Moe(Router(torch.ones(2, 32)), experts, MoeOptions(activation="gelu", k=1))
    with pytest.raises(ValueError, match=r"down is .* \[70, 90\] on cpu; expected .* \[70, 80\]"):
        native.Ffn(MlpWeights(quantised(g, 80, 70), None, quantised(g, 70, 90)), FfnOptions(activation="gelu"))
