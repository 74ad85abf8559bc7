"""Routers of random weights as even as training leaves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsc_serve.model.config import ModelConfig
from dsc_serve.model.initial import changed_config, initial_tensors, preset_config
from dsc_serve.train.balance import balanced_routers
from dsc_serve.train.quantise.walk import Walk, plainly, watch

ROUTED = {
    "moe": ("ffn.num_experts=16", "ffn.experts_per_token=2", "ffn.expert_size=64"),
    "dsc": ("ffn.num_atoms=64", "ffn.static_size=64"),
    "molora": ("ffn.num_adapters=16", "ffn.static_size=64"),
}


def small(kind: str, *changes: str) -> ModelConfig:
    sizes = ("hidden_size=64", "head_dim=16", "num_attention_heads=4", "num_key_value_heads=4", "vocab_size=512")
    return changed_config(preset_config("paper", kind, 128), [*sizes, "num_hidden_layers=4", *changes])


def alike(config: ModelConfig) -> dict[str, Tensor]:
    """Random weights of a model whose tokens have nearly all of their hidden states in common."""
    tensors = dict(initial_tensors(config, 0, torch.float32))
    tensors["model.embed_tokens.weight"] += 0.1 * torch.randn(config.hidden_size, generator=seeded(1))
    return tensors


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinct(config: ModelConfig, tensors: dict[str, Tensor], rows: int) -> float:
    """Distinct picks of a layer by so many tokens that follow each other, on average."""
    windows = torch.randint(config.vocab_size, (4, 64), generator=seeded(2))
    counts = []
    with plainly():
        walk = Walk(config, tensors)
        inputs = walk.embedded(list(windows))
        for number in range(config.num_hidden_layers):
            layer = walk.layer(number)
            watched = watch(layer)
            assert watched is not None
            inputs = walk.run(layer, inputs)
            for picked in watched.picks:
                counts += [len(picked[i : i + rows].unique()) for i in range(0, len(picked) - rows, rows)]
    return sum(counts) / len(counts)


@pytest.mark.parametrize("kind", ROUTED)
def test_tokens_that_are_alike_pick_as_independent_ones_do(kind: str) -> None:
    config, rows = small(kind, *ROUTED[kind]), 8
    before = alike(config)
    changed = balanced_routers(config, before, 0)
    assert set(changed) == {f"model.layers.{i}.mlp.router.weight" for i in range(4)}
    count, k = {
        "moe": lambda f: (f.num_experts, f.experts_per_token),
        "dsc": lambda f: (f.num_atoms, f.atoms_per_token),
        "molora": lambda f: (f.num_adapters, f.adapters_per_token),
    }[kind](config.ffn)
    independent = count * (1 - (1 - k / count) ** rows)
    assert distinct(config, before, rows) < 0.8 * independent
    assert distinct(config, before | changed, rows) > 0.9 * independent


def test_what_tokens_have_in_common_moves_no_logit() -> None:
    config = small("moe", *ROUTED["moe"])
    before = alike(config)
    after = balanced_routers(config, before, 0)
    for name, weight in after.items():
        _, sizes, directions = torch.linalg.svd(before[name].double() - weight.double())
        assert sizes[1] < 1e-4 * sizes[0]  # rows lose a part along one direction
        assert (weight.double() @ directions[0]).norm() < 1e-5 * weight.norm()  # and have none left
    again = balanced_routers(config, before, 0)
    assert again.keys() == after.keys() and all(torch.equal(again[name], after[name]) for name in after)


def test_nothing_changes_where_nothing_is_routed() -> None:
    config = small("dense")
    assert balanced_routers(config, dict(initial_tensors(config, 0, torch.float32)), 0) == {}


@pytest.mark.parametrize("preset", ["granite", "qwen"])
def test_shapes_of_mixtures_keep_their_dtype(preset: str) -> None:
    sizes = ["num_hidden_layers=2", "vocab_size=256", "hidden_size=64", "ffn.expert_size=32", "num_attention_heads=4"]
    sizes += ["num_key_value_heads=2", "head_dim=16"]
    config = changed_config(preset_config(preset, "moe", 64), sizes)
    tensors = dict(initial_tensors(config, 0, torch.bfloat16))
    changed = balanced_routers(config, tensors, 0)
    assert len(changed) == 2
    for name, weight in changed.items():
        assert weight.dtype == tensors[name].dtype and weight.shape == tensors[name].shape
        assert not torch.equal(weight, tensors[name])
