"""Steps whose tokens have adapters: as if each had a model of its own, in float64, and nothing for anybody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import naive_decoder
from support.made_adapters import merged, random_adapter
from support.small_models import small_config, wide_tensors
from support.whole_steps import BLOCK, decoder, prompts_of, step

from dsc_kernels import native, ops, plain
from dsc_kernels.adapters import add_updates
from dsc_kernels.backend import BoundAdapter
from dsc_kernels.weights import Adapted, AdapterRun, LowRank, Module
from dsc_serve.model.adapter import Adapter, composed
from dsc_serve.model.decoder import Decoder

SETS = ["plain", *native.available()]
GATED = {"mlp_gated": True, "hidden_act": "silu"}
ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "hidden_size": 33}
LATENT = {"num_key_value_heads": 1, "head_dim": 24, "latent_size": 16, "qk_norm": "latent", "rotary_dim": 8}
SHARED = {"shared_expert": {"size": 23, "gated": True}}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", {"size": 41}, GATED),
    "dense, plain, with biases": ("dense", {"bias": True}, {"attention_bias": True, "attention_output_bias": True}),
    "dense, odd": ("dense", {"size": 27}, {**GATED, **ODD, "norms": "after", "qk_norm": "head"}),
    "dense, parallel": ("dense", {}, {**ODD, "norms": "parallel"}),
    "dense, around": ("dense", {"size": 41}, {**GATED, "norms": "around", "norm_type": "rmsnorm"}),
    "dense, latent": ("dense", {"size": 41}, {**GATED, **LATENT}),  # attention's branches have no updates
    "moe, latent": ("moe", {"shared_expert": {"size": 24, "gated": False}}, LATENT),
    "dsc": ("dsc", {}, GATED),
    "moe": ("moe", SHARED, GATED),
    "moe, plain": ("moe", {"shared_expert": {"size": 24, "gated": False}}, {}),
    "moe without a shared expert": ("moe", {}, {}),
    "molora": ("molora", {}, {}),
}


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.use(request.param)
    yield request.param
    ops.use("auto")


def bound(model: Decoder, adapter: Adapter) -> BoundAdapter:
    return model.adapter(adapter.modules)


@pytest.mark.parametrize(
    "lengths",
    [(1, 1, 1, 2, 3, 2), (1, 1, 1, 9, 30, 22), (1, 1, 5), (1, 2, 3, 7, 130)],
    ids=["few", "many", "three", "long"],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_sequence_is_as_with_a_model_of_its_own(kernels: str, name: str, lengths: Sequence[int]) -> None:
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes, max_position_embeddings=144)
    tensors = wide_tensors(config)
    model = decoder(config, tensors)
    first = random_adapter("a", config, (3, 16, 1), 1)
    second = random_adapter("b", config, (0, 17, 40, 2), 2)  # not of all modules
    a, b = bound(model, first), bound(model, second)
    both = model.summed([(a, 0.5), (b, -1.25)])
    added = [[], [(first, 1.0)], [(first, 0.5), (second, -1.25)], [(second, 1.0)], [], [(first, 1.0)]][: len(lengths)]
    prompts = prompts_of(lengths)
    found = step(model, prompts, [None, a, both, b, None, a][: len(lengths)])
    for prompt, own, got in zip(prompts, added, found, strict=True):
        want = naive_decoder.logits(config, merged(config, tensors, own), prompt)
        assert float((got.double() - want).abs().max()) < 2e-3 * float(want.abs().max())
    with_base = step(model, prompts, [None] * len(prompts))
    for got, base, own in zip(found, with_base, added, strict=True):
        if own or kernels != "plain":  # torch's products round differently in other company
            assert torch.equal(got, base) == (not own), "a token without an adapter has the bits of a step without any"


@pytest.mark.parametrize("name", ["dense", "moe", "moe, latent", "dsc"])
def test_an_adapter_of_one_module_acts_where_no_other_is_adapted(kernels: str, name: str) -> None:
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    tensors = wide_tensors(config)
    model, prompts = decoder(config, tensors), prompts_of((1, 1, 6, 30))
    whole = random_adapter("a", config, (3,), 1)
    for module in {place[1] for place in whole.modules}:
        one = Adapter("a", "", "lora", {p: own for p, own in whole.modules.items() if p[1] == module}, 0, 0)
        for prompt, got in zip(prompts, step(model, prompts, [bound(model, one)] * 4), strict=True):
            want = naive_decoder.logits(config, merged(config, tensors, [(one, 1.0)]), prompt)
            assert float((got.double() - want).abs().max()) < 2e-3 * float(want.abs().max()), module


@pytest.mark.parametrize("name", ["dense", "dense, odd", "moe"])
def test_bfloat16_is_as_near_as_without_adapters(kernels: str, name: str) -> None:
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    tensors = {key: tensor.bfloat16().float() for key, tensor in wide_tensors(config).items()}
    adapter = random_adapter("a", config, (5, 16), 3)
    narrow = {
        place: LowRank(one.down.bfloat16(), one.up.bfloat16(), one.scale) for place, one in adapter.modules.items()
    }
    model, prompts = decoder(config, tensors, torch.bfloat16), prompts_of((1, 1, 4, 30))
    rounded = Adapter(
        "a", "", "lora", {p: LowRank(o.down.float(), o.up.float(), o.scale) for p, o in narrow.items()}, 0, 0
    )
    ready = model.adapter(narrow)
    for own, got in zip(prompts, step(model, prompts, [ready] * 4), strict=True):
        want = naive_decoder.logits(config, merged(config, tensors, [(rounded, 1.0)]), own)
        assert float((got.double() - want).norm()) < 0.06 * float(want.norm())
    if kernels == "plain":
        return
    base = step(model, prompts, [None] * 4)
    alone = step(model, prompts, [None, None, None, ready])
    assert all(torch.equal(x, y) for x, y in zip(base[:3], alone[:3], strict=True))


@pytest.mark.parametrize("lengths", [(1,) * 9, (1, 1, 1, 3, 2, 4, 1, 5, 3), (1, 1, 1, 30, 28, 41, 1, 37, 2)])
@pytest.mark.parametrize("name", ["dense", "dense, around", "moe", "moe, latent"])
def test_runs_that_are_joined_give_the_bits_of_those_that_are_not(
    kernels: str, name: str, lengths: Sequence[int]
) -> None:
    kind, ffn, changes = MODELS[name]
    config = small_config(kind, ffn, **changes)
    model = decoder(config, wide_tensors(config))
    a, b = (bound(model, random_adapter(name, config, (4, 18), i)) for i, name in enumerate("ab"))
    both, prompts = model.summed([(a, 0.5), (b, 2.0)]), prompts_of(sorted(lengths, key=lambda length: length > 1))
    adapters = [a, a, None, b, b, b, both, both, a]
    apart, joined = (step(model, prompts, adapters, joins) for joins in (False, True))
    if kernels == "plain":  # torch's products round differently in other company
        torch.testing.assert_close(torch.cat(apart), torch.cat(joined), rtol=1e-4, atol=1e-4)
    else:
        assert all(map(torch.equal, apart, joined))


def test_where_neighbours_stand_changes_nothing(kernels: str) -> None:
    """A token of an adapter has the same bits beside whomever."""
    config = small_config("dense", {"size": 41}, **GATED)
    model = decoder(config, wide_tensors(config))
    a, b = (bound(model, random_adapter(name, config, (4,), i)) for i, name in enumerate("ab"))
    prompts = prompts_of((1,) * 6)
    mixed = step(model, prompts, [a, b, a, None, b, a])
    for i, (own, adapter) in enumerate(zip(mixed, [a, b, a, None, b, a], strict=True)):
        alone = step(model, prompts, [adapter if j == i else None for j in range(6)])
        assert torch.equal(alone[i], own)


def test_a_product_of_sums_is_composed_as_said(kernels: str) -> None:
    config = small_config("dense", {"size": 40}, **GATED)
    tensors = wide_tensors(config)
    model = decoder(config, tensors)
    parts = [(random_adapter("a", config, (4,), 1), 0.75), (random_adapter("b", config, (4,), 2), 0.5)]
    joined = composed(parts, "product of sums")
    place = (1, "up")
    (first, w), (second, v) = ((adapter.modules[place], weight) for adapter, weight in parts)
    roots = [w * first.scale**0.5, v * second.scale**0.5]
    up = roots[0] * first.up.double() + roots[1] * second.up.double()
    down = roots[0] * first.down.double() + roots[1] * second.down.double()
    own = joined.modules[place]
    assert torch.allclose(own.up.double() @ own.down.double(), up @ down, atol=1e-5)
    (prompt,) = prompts_of((7,))
    (got,) = step(model, [prompt], [bound(model, joined)])
    want = naive_decoder.logits(config, merged(config, tensors, [(joined, 1.0)]), prompt)
    assert float((got.double() - want).abs().max()) < 2e-3 * float(want.abs().max())


def test_what_is_ready_can_be_told_again(kernels: str) -> None:
    """The matrices come out of the panels as they went in, shared by sums, and bytes are counted once."""
    config = small_config("dense", {"size": 27}, **{**GATED, **ODD})
    model = decoder(config, wide_tensors(config))
    adapters = [random_adapter(name, config, (3, 16, 1, 18), i) for i, name in enumerate("ab")]
    a, b = (bound(model, adapter) for adapter in adapters)
    for place, one in adapters[0].modules.items():
        (told,) = a.updates(*place)
        assert torch.equal(told.down, one.down) and torch.equal(told.up, one.up)
        assert torch.allclose(told.coefficients, torch.full((one.rank,), one.scale))
    assert a.updates(1, "nothing") == [] or a.updates(1, "nothing") == ()
    both = model.summed([(a, 2.0), (b, 0.5)])
    assert both.nbytes < a.nbytes / 10 and adapters[0].nbytes <= a.nbytes  # its own are scales alone
    assert [float(one.coefficients[0]) for one in both.updates(0, "q")] == [
        2 * adapters[0].modules[0, "q"].scale,
        adapters[1].modules[0, "q"].scale / 2,
    ]


def test_what_is_added_is_computed_where_the_matrices_are() -> None:
    """On a device that gives nothing back: numbers of an adapter that were fetched from it would raise."""
    device = torch.device("meta")
    for middle in (None, torch.rand(3, device=device)):
        update = LowRank(torch.empty(3, 8, device=device), torch.empty(5, 3, device=device), 0.5, middle)
        assert update.coefficients.device == device and update.coefficients.shape == (3,)
        ready = plain.adapter({(0, "up"): update}, [{"up": Module(5, 8)}], torch.float32, device)
        adapted = Adapted([AdapterRun(plain.summed([(ready, 2.0)]), 1, 2)], 0)
        x, y = torch.empty(4, 8, device=device), torch.empty(4, 5, device=device)
        assert add_updates(y, x, adapted, {"up": 0}).device == device


def test_what_does_not_fit_is_refused(kernels: str) -> None:
    config, narrow = small_config("dense"), small_config("dense", hidden_size=48)
    model, other = decoder(config, wide_tensors(config)), decoder(narrow, wide_tensors(narrow))
    good = random_adapter("a", config).modules
    one = good[0, "q"]
    for place, wrong, message in [
        ((2, "q"), one, "'q' of layer 2, which is no module"),
        ((0, "gate"), one, "'gate' of layer 0, which is no module"),
        ((0, "q"), LowRank(one.down[:, :-1], one.up, 1.0), r"'q' in layer 0 has .* expected \[r, 32\] and \[32, r\]"),
        ((0, "q"), LowRank(one.down[:2], one.up, 1.0), "'q' in layer 0 has"),
        ((0, "q"), LowRank(one.down[:0], one.up[:, :0], 1.0), "'q' in layer 0 has"),
        ((0, "q"), LowRank(one.down, one.up, 1.0, torch.ones(7)), r"rank 3 has a middle of \[7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.adapter({**good, place: wrong})
    if kernels != "plain":
        ready = bound(model, random_adapter("a", config))
        with pytest.raises(ValueError, match="a decoder of other shapes"):
            step(other, prompts_of((1,)), [ready])
        stack = model.stack
        assert stack is not None
        for runs in ([(0, 2)], [(1, 1)], [(0, 0)], [(-1, 1)]):
            model_runs = [AdapterRun(ready, *run) for run in runs]
            with pytest.raises(ValueError, match="does not fit: runs follow each other within 1 tokens"):
                stack(*one_token(model), runs=model_runs)


def one_token(model: Decoder) -> tuple[Any, ...]:
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    return zero, (zero, zero, zero), zero[None], one, 1, 1, (), model.kv_caches(1, BLOCK)
