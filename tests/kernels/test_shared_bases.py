"""Steps whose tokens have cores on a basis that they share: as if each had a model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import naive_decoder
from support.made_adapters import merged, random_adapter
from support.made_cores import random_cores, random_pairs
from support.small_models import small_config, wide_tensors
from support.whole_steps import decoder, prompts_of, step

from dsc_kernels import native, ops, plain
from dsc_kernels.adapters import add_updates
from dsc_kernels.weights import Adapted, AdapterRun, Core, LowRank, Module, Pair
from dsc_serve.model.adapter import Adapter, module_shapes

SETS = ["plain", *native.available()]
GATED = {"mlp_gated": True, "hidden_act": "silu"}
ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "hidden_size": 33}
LATENT = {"num_key_value_heads": 1, "head_dim": 24, "latent_size": 16, "qk_norm": "latent", "rotary_dim": 8}
SHARED = {"shared_expert": {"size": 23, "gated": True}}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", {"size": 41}, GATED),
    "dense, plain, with biases": ("dense", {"bias": True}, {"attention_bias": True, "attention_output_bias": True}),
    "dense, odd": ("dense", {"size": 27}, {**GATED, **ODD, "norms": "after", "qk_norm": "head"}),
    "dense, latent": ("dense", {"size": 41}, {**GATED, **LATENT}),
    "moe": ("moe", SHARED, GATED),
    "moe, plain": ("moe", {"shared_expert": {"size": 24, "gated": False}}, {}),
    "dsc": ("dsc", {}, GATED),
    "molora": ("molora", {}, {}),
}


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.use(request.param)
    yield request.param
    ops.use("auto")


@pytest.mark.parametrize(
    "lengths",
    [(1, 1, 1, 1, 1, 2, 3, 2), (1, 1, 1, 1, 9, 30, 22, 11), (1, 1, 5, 1), (1, 2, 48, 47, 48, 45)],
    ids=["few", "many", "three", "long"],
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("inner", "rank"), [(7, 7), (20, 3), (16, 33)])
def test_each_tenant_gets_what_merged_weights_give(
    kernels: str, name: str, lengths: Sequence[int], inner: int, rank: int
) -> None:
    """Tenants of two bases, LoRAs, sums of both and the base beside each other."""
    if kernels == "plain" and (inner, rank) != (20, 3):
        pytest.skip("plain torch knows no panels")
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    tensors, shapes = wide_tensors(config), module_shapes(config)
    model = decoder(config, tensors)
    first, second = (random_pairs(shapes, inner, rank + i, seed=i) for i in range(2))
    bases = model.basis(first), model.basis(second)
    a, b = (random_cores(one, first, i, own=3 * i) for i, one in enumerate("ab"))
    c = random_cores("c", second, 9, left_out=2)
    lora = random_adapter("lora", config, (4, 18), 1)
    on_a, on_b = (model.adapter(one.updates, basis=bases[0]) for one in (a, b))
    on_c, own = model.adapter(c.updates, basis=bases[1]), model.adapter(lora.modules)
    everything: list[tuple[Any, list[tuple[Adapter, float]]]] = [
        (on_a, [(a.spelt, 1.0)]),
        (on_b, [(b.spelt, 1.0)]),
        (None, []),
        (on_c, [(c.spelt, 1.0)]),
        (model.summed([(on_a, 0.5), (on_c, -1.5), (own, 1.0)]), [(a.spelt, 0.5), (c.spelt, -1.5), (lora, 1.0)]),
        (own, [(lora, 1.0)]),
        (on_b, [(b.spelt, 1.0)]),
        (on_a, [(a.spelt, 1.0)]),
    ]
    prompts = prompts_of(sorted(lengths, key=lambda length: length > 1))
    used = everything[: len(prompts)]
    got = step(model, prompts, [adapter for adapter, _ in used])
    for logits, prompt, (_, parts) in zip(got, prompts, used, strict=True):
        want = naive_decoder.logits(config, merged(config, tensors, parts), prompt)
        assert float((logits.double() - want).abs().max()) < 3e-3 * float(want.abs().max())


@pytest.mark.parametrize("name", ["dense", "dense, odd"])  # routed layers are float32 in any dtype
def test_in_float64_mixed_is_alone(name: str) -> None:
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    model = decoder(config, {own: tensor.double() for own, tensor in wide_tensors(config).items()}, torch.float64)
    pairs = random_pairs(module_shapes(config), 9, 6, 1)
    basis = model.basis(pairs)
    tenants = [model.adapter(random_cores(one, pairs, i, own=4).updates, basis=basis) for i, one in enumerate("abc")]
    lora = model.adapter(random_adapter("lora", config, (3,), 1).modules)
    order = [tenants[0], tenants[1], None, lora, tenants[2], tenants[1]]
    prompts = prompts_of((1, 1, 1, 1, 5, 9))
    mixed = step(model, prompts, order)
    for own, prompt, adapter in zip(mixed, prompts, order, strict=True):
        (alone,) = step(model, [prompt], [adapter])
        torch.testing.assert_close(own, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lengths", [(1,) * 8, (1,) * 30, (1, 1, 1, 3, 2, 40, 1, 5), (1, 2, 9, 28, 30, 37, 41, 48)])
@pytest.mark.parametrize("name", ["dense", "moe", "dense, odd"])
def test_a_tenant_has_the_same_bits_in_whatever_company(kernels: str, name: str, lengths: Sequence[int]) -> None:
    if kernels == "plain":
        pytest.skip("torch's products round differently in other company")
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    model = decoder(config, wide_tensors(config))
    pairs = random_pairs(module_shapes(config), 18, 7, 1)
    basis = model.basis(pairs)
    tenants = [
        model.adapter(random_cores(one, pairs, i, own=5 * (i % 2)).updates, basis=basis) for i, one in enumerate("abc")
    ]
    prompts = prompts_of(sorted(lengths, key=lambda length: length > 1))
    order = [(*tenants, tenants[0], None)[i % 5] for i in range(len(prompts))]
    mixed = step(model, prompts, order, joins=True)
    for i, (own, adapter) in enumerate(zip(mixed, order, strict=True)):
        alone = step(model, prompts, [adapter if j == i else None for j in range(len(prompts))])
        assert torch.equal(alone[i], own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_contractions_and_cores(dtype: torch.dtype) -> None:
    """With one thread or several the same bits."""
    if not native.available():
        pytest.skip("no kernels here")
    config = small_config("dense", {"size": 41}, **GATED)
    model = decoder(config, wide_tensors(config), dtype)
    pairs = random_pairs(module_shapes(config), 35, 40, 1)
    basis = model.basis(pairs)
    tenants = [model.adapter(random_cores(one, pairs, i).updates, basis=basis) for i, one in enumerate("abc")]
    for lengths in ((1, 1, 1, 1, 1), (1, 2, 9, 40, 48)):
        prompts, order = prompts_of(lengths), [*tenants, None, tenants[1]]
        before = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(torch.cat(step(model, prompts, order)))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_in_bfloat16_cores_are_rounded_once(kernels: str) -> None:
    """As near to the oracle as a LoRA of the same update is."""
    config = small_config("dense", {"size": 41}, **GATED)
    tensors = {name: tensor.bfloat16().float() for name, tensor in wide_tensors(config).items()}
    model = decoder(config, tensors, torch.bfloat16)
    pairs = random_pairs(module_shapes(config), 6, 6, 3)
    own = random_cores("a", pairs, 4)
    prompt = prompts_of((12,))
    (got,) = step(model, prompt, [model.adapter(own.updates, basis=model.basis(pairs))])
    want = naive_decoder.logits(config, merged(config, tensors, [(own.spelt, 1.0)]), prompt[0])
    assert float((got.double() - want).norm()) < 0.02 * float(want.norm())


def test_a_basis_is_contracted_once_for_neighbours() -> None:
    """By shape: `down` meets the tokens of all tenants in one product."""
    pair = Pair(torch.randn(4, 8), torch.randn(5, 3))
    modules = [{"up": Module(5, 8)}]
    basis = plain.basis({(0, "up"): pair}, modules, torch.float32, torch.device("cpu"))
    own = [
        plain.adapter(
            {(0, "up"): Core(torch.randn(3, 4), 0.5)}, modules, torch.float32, torch.device("cpu"), basis=basis
        )
        for _ in range(3)
    ]
    runs = [AdapterRun(own[0], 0, 2), AdapterRun(own[1], 2, 1), AdapterRun(own[2], 4, 2)]
    x, seen = torch.randn(6, 8), []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__) and args[1].shape == (8, 4):
                seen.append(args[0].shape[0])
            return super().__torch_function__(function, types, args, kwargs or {})

    y = add_updates(torch.zeros(6, 5), x.as_subclass(Watched), Adapted(runs, 0), {"up": 0})
    assert seen == [3, 2]
    for run in runs:
        rows = slice(run.first, run.first + run.length)
        (update,) = run.adapter.updates(0, "up")
        assert update.core is not None
        want = 0.5 * x[rows] @ pair.down.T @ update.core.T @ pair.up.T
        torch.testing.assert_close(y[rows].as_subclass(torch.Tensor), want)
    assert not y[3].any()


def test_what_cores_add_is_computed_where_the_matrices_are() -> None:
    """On a device that gives nothing back: numbers of an adapter that were fetched from it would raise."""
    device, modules = torch.device("meta"), [{"up": Module(5, 8)}]
    pair = Pair(torch.empty(4, 8, device=device), torch.empty(5, 3, device=device))
    basis = plain.basis({(0, "up"): pair}, modules, torch.float32, device)
    core = Core(torch.empty(3, 4, device=device), 0.5)
    a, b = (plain.adapter({(0, "up"): core}, modules, torch.float32, device, basis=basis) for _ in range(2))
    adapted = Adapted([AdapterRun(a, 0, 1), AdapterRun(plain.summed([(b, 2.0)]), 1, 2)], 0)
    x, y = torch.empty(4, 8, device=device), torch.empty(4, 5, device=device)
    assert add_updates(y, x, adapted, {"up": 0}).device == device


def test_a_basis_is_held_once_and_told_again(kernels: str) -> None:
    config = small_config("dense", {"size": 27}, **{**GATED, **ODD})
    model = decoder(config, wide_tensors(config))
    pairs = random_pairs(module_shapes(config), 17, 6, 1)
    basis = model.basis(pairs)
    cored = [random_cores(name, pairs, i) for i, name in enumerate("ab")]
    a, b = (model.adapter(own.updates, basis=basis) for own in cored)
    assert basis.nbytes >= sum(own.down.nbytes + own.up.nbytes for own in pairs.values())
    cores = sum(own.nbytes for own in cored[0].updates.values())
    assert cores <= a.nbytes < 3 * cores < basis.nbytes
    assert list(a.bases) == [basis] and list(model.summed([(a, 0.5), (b, 2.0)]).bases) == [basis]
    for place, own in cored[0].spelt.modules.items():
        (told,) = a.updates(*place)
        assert told.core is not None and own.core is not None
        assert torch.equal(told.down, own.down) and torch.equal(told.up, own.up) and torch.equal(told.core, own.core)
        assert torch.allclose(told.coefficients, torch.full((6,), own.scale))


def test_cores_that_do_not_fit_are_refused(kernels: str) -> None:
    config = small_config("dense")
    model = decoder(config, wide_tensors(config))
    pairs = random_pairs(module_shapes(config), 5, 4, 1)
    basis, place = model.basis(pairs), (0, "q")
    with pytest.raises(ValueError, match=r"core of 'q' in layer 0 is \[4, 5\]; there is no basis of it"):
        model.adapter({place: Core(torch.ones(4, 5))})
    with pytest.raises(ValueError, match=r"core of 'q' in layer 0 is \[5, 4\]; the basis there takes \[4, 5\]"):
        model.adapter({place: Core(torch.ones(5, 4))}, basis=basis)
    with pytest.raises(ValueError, match="'w' of layer 0, which is no module"):
        model.adapter({(0, "w"): Core(torch.ones(4, 5))}, basis=basis)
    down, up = pairs[place]
    with pytest.raises(ValueError, match="update of 'q' in layer 0"):
        model.adapter({place: LowRank(down, up, core=torch.ones(4, 5))})
    for wrong in (Pair(down[:, :-1], up), Pair(down, up[:-1]), Pair(down[:0], up)):
        with pytest.raises(ValueError, match=r"pair of 'q' in layer 0 has .*; expected \[k, 32\] and \[32, r\]"):
            model.basis({place: wrong})
    with pytest.raises(ValueError, match="no module of this decoder"):
        model.basis({(7, "q"): pairs[place]})
    if kernels != "plain":
        other = decoder(small_config("dense", hidden_size=48), wide_tensors(small_config("dense", hidden_size=48)))
        with pytest.raises(ValueError, match="a basis was made for another decoder"):
            other.adapter({place: Core(torch.ones(4, 5))}, basis=basis)
