"""What a family's config leaves out is what transformers' configuration of it has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.families import CASES
from support.family_defaults import stored_defaults

from dsc_serve.model.architectures import ARCHITECTURES, Settings
from dsc_serve.model.config import ModelConfig, checked_config

THEIRS = stored_defaults()
# By the name that a config has them under, what stands in `rope_parameters` there.
OLDER = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
FIXED = {"rope_interleave"}  # which DeepSeek-V2 has no field for
LOW_RANK = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}


def nothing(name: str, **given: Any) -> Settings:
    """A config that says no more than its family, and what its default is refused for."""
    content = {"architectures": [name], **({"q_lora_rank": None} if name in LOW_RANK else {}), **given}
    if name == "DeepseekV2ForCausalLM":
        content.setdefault("num_experts_per_tok", 6)
    return Settings(content, Path("config.json"))


def config_of(name: str, **given: Any) -> ModelConfig:
    return checked_config(ARCHITECTURES[name].fields(nothing(name, **given)), "config.json")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    for field, value in ARCHITECTURES[name].defaults.items():
        assert field in FIXED or THEIRS[name][OLDER.get(field, field)] == value, field


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field_that_is_asked_for_has_the_default_of_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    get = Settings.get

    def recorded(self: Settings, *names: str, default: Any = None) -> Any:
        asked.update(names if not self.prefix else ())
        return get(self, *names, default=default)

    monkeypatch.setattr(Settings, "get", recorded)
    config_of(name)
    ours = {OLDER.get(field, field): value for field, value in ARCHITECTURES[name].defaults.items()}
    asked = {OLDER.get(field, field) for field in asked}
    assert len(asked) > 10
    for field in asked & THEIRS[name].keys():
        assert ours.get(field, False) == THEIRS[name][field], field


KV = {
    "GraniteForCausalLM": 32,
    "LlamaForCausalLM": 32,
    "MistralForCausalLM": 8,
    "MixtralForCausalLM": 8,
    "Qwen2MoeForCausalLM": 16,
    "Qwen3MoeForCausalLM": 4,
    "SmolLM3ForCausalLM": 4,
    "StableLmForCausalLM": 32,
}


@pytest.mark.parametrize(("name", "heads"), KV.items())
def test_heads_of_keys_and_values_are_the_familys_and_null_is_as_many_as_queries(name: str, heads: int) -> None:
    assert config_of(name).num_key_value_heads == heads
    changed = config_of(name, num_attention_heads=64, hidden_size=4096, num_key_value_heads=None)
    assert changed.num_key_value_heads == 64


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MixtralForCausalLM"])
def test_a_window_of_null_is_none(name: str) -> None:
    assert config_of(name, sliding_window=None).window == 0


def test_bounds_of_null_are_none_and_those_left_out_the_familys() -> None:
    none = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = config_of("Gemma2ForCausalLM", **none)
    assert (config.attention_cap, config.logits_cap) == (0, 0)
    config = config_of("Gemma2ForCausalLM")
    assert (config.attention_cap, config.logits_cap) == (50, 30)


def test_a_head_is_the_width_over_the_heads_but_where_the_family_says_128() -> None:
    assert config_of("Qwen3MoeForCausalLM", hidden_size=4096).head_dim == 128
    assert config_of("Qwen3MoeForCausalLM").head_dim == 64
    assert config_of("Qwen3ForCausalLM", hidden_size=1024).head_dim == 128


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("num_experts", "num_local_experts", "MixtralForCausalLM"),
        ("num_local_experts", "num_experts", "Qwen3MoeForCausalLM"),
        ("num_local_experts", "num_experts", "OlmoeForCausalLM"),
    ],
)
def test_of_two_names_the_one_that_stands_for_the_other_counts(first: str, second: str, name: str) -> None:
    ffn = config_of(name, **{first: 24, second: 16}).ffn
    assert ffn.kind == "moe" and ffn.num_experts == 24
    assert config_of(name, **{second: 16}).ffn.model_dump()["num_experts"] == 16


def test_falcons_older_name_of_the_width_counts() -> None:
    config = config_of("FalconForCausalLM", n_embed=1024, num_attention_heads=8)
    assert (config.hidden_size, config.head_dim, config.ffn.model_dump()["size"]) == (1024, 128, 4096)


def test_longrope_takes_its_factor_for_the_quotient_of_both_contexts() -> None:
    lists = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    found = [
        config_of("Phi3ForCausalLM", rope_scaling={**lists, **given}, **beside).rope_scaling
        for given, beside in (
            ({"factor": 32.0}, {}),
            ({}, {"max_position_embeddings": 32 * 4096}),
            ({"factor": 32.0, "original_max_position_embeddings": 16}, {"max_position_embeddings": 64}),
            ({"factor": 0.5}, {"max_position_embeddings": 32 * 4096}),
            ({"factor": 32.0, "attention_factor": 1.5}, {}),
        )
    ]
    grown = (1 + math.log(32) / math.log(4096)) ** 0.5
    assert [own.magnitude for own in found if own is not None] == pytest.approx([grown, grown, grown, 1.0, 1.5])


def test_every_family_has_a_case_that_leaves_fields_out() -> None:
    named = {"FalconForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", *LOW_RANK}  # whose cases leave out many
    written = {case.config["architectures"][0] for case in CASES.values() if case.left_out}
    assert written | named >= ARCHITECTURES.keys() - {"GraniteForCausalLM", "Qwen2ForCausalLM"}
