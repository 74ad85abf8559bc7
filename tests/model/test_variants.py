"""Every architecture option against the decoder of `naive.py`, through the engine's paged path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import naive_decoder as naive
from support.small_models import small_config, wide_tensors

from dsc_serve import LLM

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
DENSE = {"kind": "dense", "size": 28}
SHARED = {"shared_expert": {"size": 13, "gated": False}, "normalize_weights": True}
EACH: dict[str, Any] = {
    "layer_kinds": [{"norms": "after"}, {"norms": "shared"}, {"norms": "parallel", "qk_norm": "all"}, {"ffn": DENSE}],
    "layer_pattern": [0, 1, 2, 3],
}
LATENT = {"num_key_value_heads": 1, "head_dim": 24, "rotary_dim": 8, "latent_size": 14, "qk_norm": "latent"}
GROUPS = {"groups": 3, "groups_used": 2, "weight_scale": 1.7, "num_experts": 6, "experts_per_token": 3}
SIGMOID = {"scoring": "sigmoid", "choice_bias": True, "group_picks": 2, "normalize_weights": True, **GROUPS}
WINDOWS: dict[str, Any] = {
    "window": 5,
    "layer_kinds": [{"rope_theta": 50.0}, {"window": 0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}],
    "layer_pattern": [0, 0, 1],
    "num_hidden_layers": 4,
}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dsc", {}, {}),
    ("dsc", {"position_embedding_type": "learned", "tie_word_embeddings": False}, {}),
    ("dsc", {"norm_type": "rmsnorm", "hidden_act": "silu", "mlp_gated": True}, {}),
    ("dsc", {}, {"router_norm": False, "router_bias": False, "gamma": "scalar"}),
    ("dsc", {}, {"router_bias": False, "tau": 0.05}),
    ("dsc", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}, {"atoms_per_token": 37}),
    ("dsc", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "rope_theta": 500.0}, {}),
    ("moe", {}, {}),
    ("moe", {"mlp_gated": True, "hidden_act": "silu"}, {"normalize_weights": True, "router_norm": False}),
    ("molora", {}, {}),
    ("molora", {"mlp_gated": True, "norm_type": "rmsnorm"}, {"rank": 1}),
    ("dense", {"norm_type": "rmsnorm", "mlp_gated": True, "hidden_act": "silu", "num_key_value_heads": 1}, {}),
    ("dense", {"attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}, {"bias": True}),
    ("dense", {"attention_output_bias": True, "mlp_gated": True, "rope_scaling": LLAMA3}, {"bias": True}),
    ("dense", {"norm_type": "rmsnorm", "rope_theta": 50.0, "rope_scaling": YARN}, {}),
    ("dense", {"rope_scaling": {"rope_type": "divisors", "divisors": [1, 1, 1.5, 2, 3, 4, 4.5, 8.0]}}, {}),
    ("dsc", {"norms": "after", "qk_norm": "all", "norm_type": "rmsnorm"}, {}),
    ("molora", {"norms": "parallel", "rotary_dim": 6, "hidden_act": "gelu_tanh"}, {}),
    ("dense", {"norms": "shared", "qk_norm": "head", "num_key_value_heads": 1}, {"bias": True}),
    ("dense", {"rotation": False, "mlp_gated": True, "hidden_act": "gelu_tanh"}, {"bias": True}),
    ("moe", {"norms": "after", "mlp_gated": True}, {"shared_expert": {"size": 9}}),
    ("moe", {"layer_kinds": [{"ffn": DENSE, "rotation": False}, {}], "layer_pattern": [0, 1]}, SHARED),
    ("dense", {**EACH, "num_hidden_layers": 5}, {}),
    ("dsc", {"layer_kinds": [{"qk_norm": "head"}, {"norms": "after"}], "layer_pattern": [0, 1], "qk_norm": "all"}, {}),
    ("dsc", {"window": 3}, {}),
    ("dense", WINDOWS, {}),
    ("molora", {"attention_cap": 0.7, "logits_cap": 2.0, "embedding_scale": 3.0}, {}),
    ("moe", {"norms": "around", "window": 4, "attention_cap": 1.5, "norm_type": "rmsnorm"}, {}),
    ("dsc", {"norms": "around", "position_embedding_type": "learned", "embedding_scale": 0.5}, {}),
    ("dense", LATENT, {}),
    ("moe", {**LATENT, "window": 6}, GROUPS),
    ("moe", {"mlp_gated": True, "norm_type": "rmsnorm"}, SIGMOID),
    ("moe", {}, {"scoring": "sigmoid", "router_norm": False}),
]


@pytest.mark.parametrize(("kind", "changes", "ffn"), VARIANTS)
def test_variant_equals_the_naive_decoder(
    kind: str, changes: dict[str, Any], ffn: dict[str, Any], small_model: Callable[..., Path]
) -> None:
    config = small_config(kind, ffn, **changes)
    tensors = wide_tensors(config)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in (1, 17, 29)]
    folder = small_model(kind, ffn, **changes)
    with LLM(str(folder), dtype="float32", step_tokens=10, max_running=4, block_size=8) as llm:
        for ids, got in zip(prompts, llm.logits(prompts), strict=True):
            torch.testing.assert_close(got.double(), naive.logits(config, tensors, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_bfloat16_is_near_float32(kind: str, small_model: Callable[..., Path]) -> None:
    folder = small_model(kind)
    ids = [[5, 9, 33, 2, 60, 14, 7]]
    with LLM(str(folder), dtype="float32") as exact, LLM(str(folder), dtype="bfloat16") as rounded:
        (want,), (got,) = exact.logits(ids), rounded.logits(ids)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()
