"""Experts and adapters that tokens pick are reported as atoms are: those of the plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import naive_decoder
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.weights import LayerOutputs, MlpWeights, MoeOptions, Router, SharedExpert
from dsc_serve import LLM, SamplingParams
from dsc_serve.model.ffn.picks import NOTHING, PickShape, picking_layers

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
DENSE_BETWEEN: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_kinds": [{"ffn": {"kind": "dense", "size": 28}}, {}],
    "layer_pattern": [1, 0],
}
MODELS: list[tuple[str, dict[str, Any], dict[str, Any], PickShape, tuple[int, ...]]] = [
    ("moe", {}, {}, PickShape("experts", 5, 2), (0, 1)),
    ("moe", {"normalize_weights": True, "router_norm": False}, {}, PickShape("experts", 5, 2), (0, 1)),
    ("moe", {"shared_expert": {"size": 12}}, DENSE_BETWEEN, PickShape("experts", 5, 2), (0, 2)),
    ("molora", {}, {}, PickShape("adapters", 6, 2), (0, 1)),
]


def expected(kind: str, ffn: dict[str, Any], changes: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the plainest form picks of each token: rows [layers, T, k], and gates; in the layers that pick."""
    rows: list[Tensor] = []
    gates: list[Tensor] = []
    config = small_config(kind, ffn, **changes)
    name = f"{kind}_picks"
    picks = getattr(naive_decoder, name)

    def recorded(*given: Any) -> tuple[Tensor, Tensor]:
        weights, picked = picks(*given)
        rows.append(picked)
        gates.append(weights)
        return weights, picked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive_decoder, name, recorded)
        naive_decoder.logits(config, wide_tensors(config), PROMPT)
    return [torch.stack(part).unflatten(0, (-1, len(PROMPT))) for part in (rows, gates)]  # type: ignore[return-value]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(("kind", "ffn", "changes", "shape", "layers"), MODELS)
def test_they_are_those_of_the_plain_formulas(
    small_model: Callable[..., Path],
    kind: str,
    ffn: dict[str, Any],
    changes: dict[str, Any],
    shape: PickShape,
    layers: tuple[int, ...],
    kernels: str,
) -> None:
    rows, gates = expected(kind, ffn, changes)
    with LLM(str(small_model(kind, ffn, **changes)), dtype="float32", kernels=kernels, threads=1) as llm:
        capacity = llm.engine.capacity
        assert (capacity.picks, capacity.pickable, capacity.picks_per_token) == shape
        assert capacity.picking == layers
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=0, routing=-1))
    assert output.routing is not None
    picked, weights, signal = output.routing.arrays
    assert picked.shape == (len(PROMPT), len(layers), 2)
    np.testing.assert_array_equal(picked, np.transpose(rows, (1, 0, 2)))
    np.testing.assert_allclose(weights, np.transpose(gates, (1, 0, 2)), rtol=1e-4)
    np.testing.assert_array_equal(signal, weights.max(axis=-1))


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(("kind", "ffn", "changes", "shape", "layers"), MODELS)
def test_reporting_changes_nothing_that_is_generated(
    small_model: Callable[..., Path],
    kind: str,
    ffn: dict[str, Any],
    changes: dict[str, Any],
    shape: PickShape,
    layers: tuple[int, ...],
    kernels: str,
) -> None:
    prompts = [PROMPT, [7] * 4]
    with LLM(str(small_model(kind, ffn, **changes)), kernels=kernels, threads=1) as llm:
        plain, reported = (
            llm.generate(prompts, SamplingParams(max_tokens=6, seed=3, routing=k, logprobs=0)) for k in (0, 1)
        )
    assert [output.logprobs for output in plain] == [output.logprobs for output in reported]
    for output in reported:
        assert output.routing is not None
        assert output.routing.shape == (len(output.prompt_token_ids) + 5, len(layers), 1)


def test_layers_that_pick_differently_are_not_told() -> None:
    wider = {"kind": "moe", "num_experts": 6, "experts_per_token": 2, "expert_size": 20}
    config = small_config("moe", layer_kinds=[{"ffn": wider}, {}], layer_pattern=[0, 1])
    assert picking_layers(config) == (NOTHING, ())
    assert picking_layers(small_config("dense")) == (NOTHING, ())


@pytest.mark.skipif(native.active() is None, reason="there are no native kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_layer_gives_the_same_output_bit_for_bit(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def mlp(size: int) -> MlpWeights:
        return MlpWeights(random(size, 32), random(size, 32), random(32, size))

    options = MoeOptions(activation="silu", k=3, normalize=True)
    shared = SharedExpert(mlp(9), random(32))
    layer = ops.moe(Router(random(7, 32)), [mlp(20) for _ in range(7)], options, shared)
    x, residual = random(tokens, 32), random(tokens, 32)
    out, experts, weights = layer.routed(x, residual)
    assert torch.equal(layer(x, residual), out) and torch.equal(layer(x), layer.routed(x)[0])
    assert experts.shape == weights.shape == (tokens, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(tokens), rtol=0, atol=1e-5)
    assert bool((weights.diff(dim=1) <= 0).all())


def test_what_a_mixture_has_not_cannot_be_asked_for() -> None:
    room = LayerOutputs.everything(4, 2, signal=False)
    assert room.signal is None and len(room.picked) == 2
    assert len(LayerOutputs.everything(4, 2).picked) == 3
