"""Steps whose tokens are of tenants of one bank: each as with a model of its own, and the base as without any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import naive_decoder
from support.made_adapters import merged, random_adapter
from support.small_models import small_config, wide_tensors
from support.tenants import as_tenant, random_tenant, silenced
from support.whole_steps import decoder, prompts_of, step
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.adapters import PlainAdapter
from dsc_kernels.weights import Adapted, AdapterRun, Tuning
from dsc_serve.model.adapter import BankTenant
from dsc_serve.model.config import DscConfig, ModelConfig
from dsc_serve.model.decoder import Decoder

SETS = ["plain", *native.available()]
GATED = {"mlp_gated": True, "hidden_act": "silu"}
ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "hidden_size": 33}
ALGORITHM_1 = {"router_norm": False, "router_bias": False, "gamma": "scalar"}
UPPER = {"layer_kinds": [{"ffn": {"kind": "dense", "size": 24}}, {}], "layer_pattern": [0, 1]}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gated": ({}, GATED),
    "odd": ({"num_atoms": 19, "static_size": 27}, {**ODD, "norms": "around"}),
    "algorithm 1": (ALGORITHM_1, GATED),
    "many picks": ({"num_atoms": 70, "atoms_per_token": 11}, GATED),
    "upper layers": ({}, {**GATED, **UPPER, "num_hidden_layers": 4}),
}


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.use(request.param)
    yield request.param
    ops.use("auto")


@pytest.fixture(params=["exact", "int8-certified"])
def router(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_router(request.param)
    yield request.param
    native.use_router("auto")


def made(name: str, silent: bool) -> tuple[ModelConfig, dict[str, Tensor]]:
    ffn, changes = MODELS[name]
    config = small_config("dsc", ffn, **changes)
    tensors = wide_tensors(config)
    return config, silenced(config, tensors) if silent else tensors


def alone(
    config: ModelConfig, tensors: dict[str, Tensor], tenant: BankTenant, weight: float, prompt: list[int]
) -> Tensor:
    return naive_decoder.logits(*as_tenant(config, tensors, tenant, weight), prompt)


@pytest.mark.parametrize("silent", [False, True], ids=["of a model with atoms", "of an empty branch"])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 2, 3, 2), (1, 1, 1, 9, 30, 22)], ids=["few", "many"])
@pytest.mark.parametrize("name", MODELS)
def test_each_sequence_is_as_with_a_model_of_its_own(
    kernels: str, router: str, name: str, lengths: Sequence[int], silent: bool
) -> None:
    config, tensors = made(name, silent)
    model = decoder(config, tensors)
    first, second = random_tenant(config, 1), random_tenant(config, 2, bias=3.0)
    lora = random_adapter("lora", config, (3, 16), 1)
    a, b = (model.adapter({}, tenant=tenant) for tenant in (first, second))
    low = model.adapter(lora.modules)
    both = model.summed([(low, 0.5), (a, -0.75)])
    prompts = prompts_of(lengths)
    found = step(model, prompts, [None, a, low, b, both, a])
    with_lora, halved = merged(config, tensors, [(lora, 1.0)]), merged(config, tensors, [(lora, 0.5)])
    wanted = [
        naive_decoder.logits(config, tensors, prompts[0]),
        alone(config, tensors, first, 1.0, prompts[1]),
        naive_decoder.logits(config, with_lora, prompts[2]),
        alone(config, tensors, second, 1.0, prompts[3]),
        alone(config, halved, first, -0.75, prompts[4]),
        alone(config, tensors, first, 1.0, prompts[5]),
    ]
    for got, want in zip(found, wanted, strict=True):
        assert float((got.double() - want).abs().max()) < 2e-3 * float(want.abs().max())
    if kernels == "plain":  # torch's products round differently in other company
        return
    base = step(model, prompts, [None] * 6)
    assert torch.equal(found[0], base[0]) and not any(map(torch.equal, found[1:], base[1:]))
    for i, adapter in enumerate([None, a, low, b, both, a]):
        by_itself = step(model, prompts, [adapter if j == i else None for j in range(6)])
        assert torch.equal(by_itself[i], found[i]), "a token has the same bits beside whomever"


@pytest.mark.parametrize("lengths", [(1, 1, 3), (1, 5, 60)], ids=["few", "many"])
def test_an_empty_branch_is_the_dense_model_bit_for_bit(kernels: str, router: str, lengths: Sequence[int]) -> None:
    config, tensors = made("gated", True)
    ffn = config.ffn
    assert isinstance(ffn, DscConfig)
    dense = small_config("dense", {"size": ffn.static_size}, **GATED, max_position_embeddings=64)
    config = config.model_copy(update={"max_position_embeddings": 64})
    kept = {name.replace(".static.", "."): one for name, one in tensors.items()}
    kept = {name: one for name, one in kept.items() if ".router" not in name and "atoms_" not in name}
    kept = {name: one for name, one in kept.items() if not name.endswith("gamma")}
    prompts = prompts_of(lengths)
    model, base = decoder(config, tensors), decoder(dense, kept)
    tenant = model.adapter({}, tenant=random_tenant(config, 1))
    assert all(map(torch.equal, step(model, prompts, [None] * 3), step(base, prompts, [None] * 3)))
    if kernels != "plain":
        mixed = step(model, prompts, [tenant, None, None])
        assert all(map(torch.equal, mixed[1:], step(base, prompts, [None] * 3)[1:]))


@pytest.mark.parametrize("tokens", [5, 40])
def test_a_silent_layer_routes_the_tokens_of_tenants_alone(kernels: str, router: str, tokens: int) -> None:
    config, tensors = made("gated", True)
    model = decoder(config, tensors)
    layer = model.layers[1].ffn
    own = model.adapter({}, tenant=random_tenant(config, 1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, config.hidden_size, generator=generator)
    runs = [AdapterRun(own, 1, 2), AdapterRun(own, tokens - 1, 1)]
    before = layer.rescored  # type: ignore[attr-defined]
    out, picks = layer.routed(x, adapted=Adapted(runs, 1))  # type: ignore[attr-defined]
    routed = torch.zeros(tokens, dtype=torch.bool)
    routed[[1, 2, tokens - 1]] = True
    assert bool((picks.coefficients[routed] > 0).all()) and bool((picks.signal[routed] > 0).all())
    assert not bool(picks.coefficients[~routed].any()) and not bool(picks.signal[~routed].any())
    assert torch.equal(picks.atoms[~routed].long(), torch.arange(3).repeat(tokens - 3, 1))
    routed_tokens = layer.rescored[1]  # type: ignore[attr-defined]
    base = layer(x)
    assert layer.rescored[1] == routed_tokens, "a step of nobody's is that of a dense layer"  # type: ignore[attr-defined]
    same = [torch.equal(one, other) for one, other in zip(out, base, strict=True)]
    assert same == (~routed).tolist() or kernels == "plain"
    if kernels != "plain" and router == "int8-certified":
        assert layer.rescored[1] - before[1] == 3, "no other token met the router"  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokens", [6, 50])
def test_grouped_composition_gives_the_same_bits(kernels: str, router: str, tokens: int) -> None:
    config, tensors = made("many picks", True)
    model = decoder(config, tensors)
    a, b = (model.adapter({}, tenant=random_tenant(config, seed)) for seed in (1, 2))
    runs = [AdapterRun(a, 0, 2), AdapterRun(b, 3, tokens - 3)]
    layer = model.layers[0].ffn.layer
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(0))
    one, other = (layer(x, grouped=grouped, adapted=Adapted(runs, 0)) for grouped in (False, True))  # type: ignore[call-arg]
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e-3, 10.0, 1e4, 1e7])
def test_the_screen_is_exact_with_biases_of_any_size(kernels: str, size: float) -> None:
    """Bounds allow for what adding a tenant's bias rounds, which the layer's own says nothing of."""
    if kernels == "plain":
        pytest.skip("plain torch screens nothing")
    config = small_config("dsc", {"num_atoms": 300, "atoms_per_token": 4, "tau": 1e9}, **GATED)
    tensors = silenced(config, wide_tensors(config))
    x = torch.randn(40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    tenants = [random_tenant(config, seed, bias=size) for seed in range(2)]
    for tenant in tenants:
        tenant.bias[:, ::7] = size  # many tie but for the product
    picked = []
    for precision in ("exact", "int8-certified"):
        native.use_router(precision)  # type: ignore[arg-type]
        model = decoder(config, tensors)
        native.use_router("auto")
        a, b = (model.adapter({}, tenant=tenant) for tenant in tenants)
        runs = [AdapterRun(a, 0, 15), AdapterRun(b, 20, 20)]
        layer = model.layers[0].ffn
        assert layer.layer.screened == (precision != "exact")  # type: ignore[attr-defined]
        _, picks = layer.routed(x, adapted=Adapted(runs, 0))  # type: ignore[attr-defined]
        picked.append(picks)
    exact, screened = picked
    scale = max(1.0, size)
    assert torch.allclose(exact.coefficients, screened.coefficients, atol=1e-5 * scale, rtol=1e-4)
    kept = [set(one) == set(other) for one, other in zip(exact.atoms.tolist(), screened.atoms.tolist(), strict=True)]
    assert sum(kept) >= (38 if size < 1e4 else 0), "sets differ where logits tie to their last bits alone"


def test_bfloat16_tenants_are_as_near_as_the_base(kernels: str) -> None:
    config, tensors = made("gated", True)
    tensors = {name: one.bfloat16().float() for name, one in tensors.items()}
    model = decoder(config, tensors, torch.bfloat16)
    tenant = random_tenant(config, 1, gamma=0.3)
    prompts = prompts_of((1, 4, 30))
    found = step(model, prompts, [None, model.adapter({}, tenant=tenant), None])
    for got, prompt in zip(found, prompts, strict=True):
        own = as_tenant(config, tensors, tenant) if prompt is prompts[1] else (config, tensors)
        want = naive_decoder.logits(*own, prompt)
        assert float((got.double() - want).norm()) < 0.06 * float(want.norm())


def test_what_a_tenant_has_can_be_told_again(kernels: str) -> None:
    config, tensors = made("upper layers", True)
    model = decoder(config, tensors)
    tenant = random_tenant(config, 1)
    own = model.adapter({}, tenant=tenant)
    assert list(own.tunings) == [1, 3]
    for told, bias, gamma in zip(own.tunings.values(), tenant.bias, tenant.gamma, strict=True):
        assert torch.equal(told.gamma, gamma) and told.bias.shape == bias.shape
    doubled = model.summed([(own, 2.0)])
    assert torch.equal(doubled.tunings[3].gamma, 2 * tenant.gamma[1])
    assert torch.equal(doubled.tunings[3].bias, own.tunings[3].bias)
    assert tenant.nbytes <= own.nbytes < 1.4 * tenant.nbytes + 1024


def test_what_does_not_fit_is_refused(kernels: str) -> None:
    config, tensors = made("upper layers", True)
    model = decoder(config, tensors)
    tenant = random_tenant(config, 1)
    with pytest.raises(ValueError, match="a tenant of 1 layers' banks; the model has 2"):
        model.adapter({}, tenant=BankTenant(tenant.bias[:1], tenant.gamma[:1]))
    with pytest.raises(ValueError, match="2 of the adapters are tenants of a bank; a sum may have one"):
        model.summed([(model.adapter({}, tenant=tenant), 0.5)] * 2)
    good = Tuning(torch.zeros(37), torch.zeros(32))
    for layer, wrong, message in [
        (0, good, "tenant of the bank of layer 0, which has none"),
        (1, Tuning(torch.zeros(36), torch.zeros(32)), r"tuning of layer 1 has .* expected float32 \[37\] and \[32\]"),
        (1, Tuning(torch.zeros(37).double(), torch.zeros(32)), "tuning of layer 1 has"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.adapter({}, model.modules, torch.float32, torch.device("cpu"), tunings={layer: wrong})


def test_plain_adapters_hold_what_they_are_given() -> None:
    assert PlainAdapter({}, 0).tunings == {}


def test_a_model_without_a_bank_has_no_tenants(kernels: str) -> None:
    config = small_config("dense", {"size": 24}, **GATED)
    model: Decoder = decoder(config, wide_tensors(config))
    with pytest.raises(ValueError, match="a tenant of 1 layers' banks; the model has 0"):
        model.adapter({}, tenant=BankTenant(torch.zeros(1, 37), torch.zeros(1, 32)))
