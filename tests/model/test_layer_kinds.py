"""Layers of differing kinds as a configuration says them: compact, checked, and written so that older versions read
what they know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import small_config, wide_tensors

from dsc_kernels import native
from dsc_serve.model.architectures.family import by_layer
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config, load_config, stored_fields
from dsc_serve.model.decoder import parameter_counts, tensor_shapes
from dsc_serve.model.description import describe
from dsc_serve.train.network import Network
from dsc_serve.train.settings import TrainError

DENSE = {"kind": "dense", "size": 28}
MOE = {"kind": "moe", "num_experts": 6, "experts_per_token": 3, "expert_size": 4}
LEARNED = {"position_embedding_type": "learned"}
TWO = {"layer_kinds": [{"rotation": False}, {"ffn": DENSE}], "layer_pattern": [1, 1, 0]}


def test_a_pattern_is_repeated_over_the_layers() -> None:
    layers = small_config("moe", num_hidden_layers=7, **TWO).layers
    assert [layer.ffn.kind for layer in layers] == ["dense", "dense", "moe"] * 2 + ["dense"]
    assert [layer.rotation for layer in layers] == [True, True, False] * 2 + [True]
    assert len({id(layer) for layer in layers}) == 2 and not layers[0].layer_kinds
    alike = small_config("moe")
    assert alike.layers == (alike, alike)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_pattern": [0]}, "layer_pattern names [0] of the layer_kinds, of which are 0"),
        ({**TWO, "layer_pattern": [0, 2]}, "layer_pattern names [0, 2] of the layer_kinds, of which are 2"),
        ({**TWO, "layer_pattern": [1, 1]}, "layer_pattern names [1] of the layer_kinds, of which are 2"),
        ({**TWO, "num_hidden_layers": 2}, "layer_pattern has 3 entries, more than num_hidden_layers, 2"),
        ({**TWO, "layer_pattern": [-1, 0, 1]}, "layer_pattern.0: Input should be greater than or equal to 0 (got -1)"),
        ({"layer_kinds": [{"windows": 3}], "layer_pattern": [0]}, "layer_kinds.0.windows: Extra inputs"),
        (
            {"norms": "behind"},
            "norms: Input should be 'before', 'after', 'parallel', 'shared' or 'around' (got 'behind')",
        ),
        ({"qk_norm": True}, "qk_norm: Input should be 'none', 'head', 'all' or 'latent' (got True)"),
        ({"window": -1}, "window: Input should be greater than or equal to 0 (got -1)"),
        ({"logits_cap": -2.0}, "logits_cap: Input should be greater than or equal to 0 (got -2.0)"),
        ({"qk_norm": "latent"}, "qk_norm is 'latent', but latent_size is not given"),
        (
            {"latent_size": 8, "num_key_value_heads": 2, "qk_norm": "latent"},
            "num_key_value_heads is 2, head_dim 16; it",
        ),
        (
            {"latent_size": 16, "num_key_value_heads": 1, "qk_norm": "latent"},
            "latent_size is 16, num_key_value_heads is",
        ),
        ({"latent_size": 8, "num_key_value_heads": 1}, "latent_size is given; it needs qk_norm 'latent'"),
        ({"latent_size": 8, "num_key_value_heads": 1, "qk_norm": "latent"}, "rotary_dim is 16; only 8 are not latent"),
        ({"ffn": {**MOE, "groups": 4}}, "num_experts is 6, which groups, 4, does not divide"),
        ({"ffn": {**MOE, "groups": 3, "groups_used": 4}}, "groups_used is 4, more than groups, 3"),
        ({"ffn": {**MOE, "groups": 3}}, "experts_per_token is 3, group_picks 1; 1 of 3 parts have 2 experts"),
        (
            {"layer_kinds": [{"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}], "layer_pattern": [0]},
            "layer_kinds.0.rope_scaling",
        ),
        ({"rotary_dim": 7}, "rotary_dim is 7; it must be even and at most head_dim, 16"),
        (LEARNED | {"rotary_dim": 8}, "rotary_dim is given, but position_embedding_type is 'learned'"),
        (LEARNED | {"rotation": False}, "rotation is given, but position_embedding_type is 'learned'"),
        (LEARNED | TWO, "rotation is given, but position_embedding_type is 'learned'"),
        ({"rotary_dim": 18}, "rotary_dim is 18; it must be even and at most head_dim, 16"),
        (
            {
                "ffn": {"kind": "dsc", "num_atoms": 9, "atoms_per_token": 2, "static_size": 4},
                "layer_kinds": [{}, {"ffn": MOE}],
                "layer_pattern": [1, 1, 0],
            },
            "some are of kind 'dsc' and one of kind 'moe'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    fields = small_config("moe", num_hidden_layers=3).model_dump() | changes
    with pytest.raises(CheckpointError) as error:
        checked_config(fields, "config.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "ffn", "number"),
    [
        ("dsc", {}, {}, 1),
        ("moe", {"norm_type": "rmsnorm"}, {"normalize_weights": True}, 1),
        ("dense", {"norms": "after"}, {}, 2),
        ("dense", {"qk_norm": "head"}, {}, 2),
        ("dense", {"rotary_dim": 8}, {}, 2),
        ("dense", {"rotation": False}, {}, 2),
        ("dense", {"hidden_act": "gelu_tanh"}, {}, 2),
        ("moe", {}, {"shared_expert": {"size": 4}}, 2),
        ("moe", {**TWO, "num_hidden_layers": 3}, {}, 2),
        ("dense", {"window": 4}, {}, 3),
        ("dense", {"norms": "around"}, {}, 3),
        ("dense", {"attention_cap": 4.0}, {}, 3),
        ("dense", {"logits_cap": 4.0}, {}, 3),
        ("dense", {"embedding_scale": 4.0}, {}, 3),
        ("dense", {"layer_kinds": [{"window": 2}, {}], "layer_pattern": [0, 1]}, {}, 3),
        ("dense", {"layer_kinds": [{"rope_theta": 2.0}, {}], "layer_pattern": [0, 1]}, {}, 3),
        ("moe", {}, {"scoring": "sigmoid"}, 3),
        ("moe", {}, {"weight_scale": 2.0}, 3),
    ],
)
def test_the_lowest_format_that_holds_a_model_is_written(
    kind: str, changes: dict[str, Any], ffn: dict[str, Any], number: int, small_model: Callable[..., Path]
) -> None:
    config, folder = small_config(kind, ffn, **changes), small_model(kind, ffn, **changes)
    content = json.loads((folder / "config.json").read_text())
    assert content["format"] == number == stored_fields(config)["format"]
    new = {"norms", "qk_norm", "rotation", "rotary_dim", "layer_kinds", "layer_pattern"}
    assert new & content.keys() == changes.keys() & new
    assert load_config(folder) == config


def test_layers_that_differ_come_as_two_kinds() -> None:
    common: dict[str, Any] = {"ffn": 1}
    assert by_layer(common, {"ffn": 2}, [False] * 4) == common
    assert by_layer(common, {"ffn": 2}, [True] * 4) == {"ffn": 2}
    found = by_layer(common, {"ffn": 2}, [True, False] * 3)
    assert found == {"ffn": 1, "layer_kinds": [{"ffn": 2}, {}], "layer_pattern": [0, 1]}
    assert by_layer(common, {"ffn": 2}, [False, False, True])["layer_pattern"] == [0, 0, 1]


def test_each_layer_counts_its_own_parameters() -> None:
    config = small_config("moe", num_hidden_layers=3, **TWO)
    total, active = parameter_counts(config)
    assert total == sum(tensor.numel() for tensor in wide_tensors(config).values())
    assert total - active == (5 - 2) * 2 * 32 * 20  # one mixture of 5 experts of which 2 are picked
    names = tensor_shapes(config)
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.2.mlp.router.weight" in names


def test_inspect_tells_the_kinds(small_model: Callable[..., Path]) -> None:
    changes = {**TWO, "num_hidden_layers": 3, "qk_norm": "head", "rotary_dim": 8, "norms": "after"}
    folder = small_model("moe", {"shared_expert": {"size": 12}}, **changes)
    rows = describe(load_model(folder, "float32", torch.device("cpu")))
    moe = "moe, 2 of 5 experts of width 20, and one that all tokens share of width 12"
    assert rows["ffn"] == f"dense, width 28 (2 layers); {moe} (1 layers)"
    assert rows["context"] == (
        "48 tokens, rope positions of 8 of 16 numbers of a head (2 layers); no positions (1 layers)"
    )
    assert rows["norm"] == "layernorm after each branch; of queries and keys per head"
    if native.active() is not None:
        assert rows["kernels"].startswith("native C++") and "plain" not in rows["kernels"]


@pytest.mark.parametrize(
    ("changes", "ffn", "name"),
    [
        ({"norms": "after"}, {}, "norms is 'after'; trained: 'before'"),
        ({"qk_norm": "head"}, {}, "qk_norm is 'head'"),
        ({"rotary_dim": 8}, {}, "rotary_dim is 8"),
        ({"rotation": False}, {}, "rotation is False"),
        ({"layer_kinds": [{}], "layer_pattern": [0]}, {}, "layer_kinds is"),
        ({"hidden_act": "gelu_tanh"}, {}, "hidden_act is 'gelu_tanh'"),
        ({}, {"shared_expert": {"size": 4}}, "ffn.shared_expert is given"),
        ({"window": 5}, {}, "window is 5; trained: 0"),
        ({"attention_cap": 5.0}, {}, "attention_cap is 5.0"),
        ({"logits_cap": 5.0}, {}, "logits_cap is 5.0"),
        ({"embedding_scale": 5.0}, {}, "embedding_scale is 5.0"),
        ({}, {"scoring": "sigmoid"}, "ffn picks experts otherwise"),
    ],
)
def test_what_is_served_but_not_trained_is_refused(changes: dict[str, Any], ffn: dict[str, Any], name: str) -> None:
    config: ModelConfig = small_config("moe", ffn, **changes)
    with pytest.raises(TrainError, match=name):
        Network(config, torch.float32, torch.device("cpu"))
