"""Adapters of bases whose weights are in 4 and 8 bits: what they add is not rounded with these."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support import naive_decoder
from support.made_adapters import merged, random_adapter
from support.quantised_cases import bound as product_bound
from support.quantised_cases import quantised
from support.small_models import small_config, wide_tensors
from test_adapted_steps import MODELS, bound, kernels, prompts_of, step
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.quantised import Bits, Weight
from dsc_kernels.weights import Adapted, AdapterRun, FfnOptions, LowRank, MlpWeights, Module
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.rounding import rounded
from dsc_serve.weight_forms import EIGHT_AT_LEAST, part_of

__all__ = ["kernels"]  # a fixture
CPU = torch.device("cpu")
# Inputs of quantised products are rounded to int8, which plain torch does not do.
NEAR = {"plain": 2e-3}
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
        assert float((got.double() - want).norm()) < NEAR.get(kernels, 0.06) * size
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
