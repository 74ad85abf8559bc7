"""Errors call a field by the name that the checkpoint has it under, whatever the field is called here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.families import CASES, family_folder
from support.family_files import FILES, family_file

from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import CheckpointError
from dsc_serve.model.field_value import FieldValue, plain, reworded, told

EACH = {case.config["model_type"]: name for name, case in reversed(CASES.items())}
# What is read of no family's config, or of none of those that have it.
UNREAD = {"model_type", "torch_dtype", "pad_token_id", "n_ctx", "cache_implementation", "head_dim"}
UNREAD_OF = {
    "deepseek_v2": {"num_key_value_heads", "n_group", "topk_group"},
    "deepseek_v3": {"num_key_value_heads"},
    "qwen2_moe": {"intermediate_size"},  # of dense layers alone, which the case does not have
    "qwen3_moe": {"intermediate_size"},
}
FIELDS = [
    (name, field)
    for kind, name in EACH.items()
    for field in CASES[name].config
    if field not in UNREAD | UNREAD_OF.get(kind, set())
]
WRONG = "no such thing"
# What is not read of files, as in llama.cpp: what tensors say, or what another field says.
UNREAD_IN_FILES = {
    "stablelm.use_parallel_residual",
    "qwen2moe.feed_forward_length",
    "qwen3moe.feed_forward_length",
    "deepseek2.attention.head_count_kv",
    "gpt2.attention.head_count_kv",
    "gptneox.attention.head_count_kv",
}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_source(folder).check()
    return str(error.value).split(": ", 1)[1]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_wrong_value_is_told_with_its_field_and_what_is_allowed(name: str, field: str, tmp_path: Path) -> None:
    value: Any = [WRONG] if field == "architectures" else WRONG
    message = refusal(family_folder(name, tmp_path / "m", **{field: value}))
    if field == "architectures":
        assert message.startswith(f"architecture '{WRONG}' is not supported; supported: ")
    else:
        assert re.match(rf"{field}(: Input should be | is '{WRONG}'[;,] (supported: |expected ))", message), message
        assert WRONG in message


BOUNDS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"intermediate_size": 0}, "intermediate_size: Input should be greater than or equal to 1 (got 0)"),
    ("mixtral", {"rms_norm_eps": -1.0}, "rms_norm_eps: Input should be greater than 0 (got -1.0)"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than num_local_experts, 5"),
    ("mixtral", {"num_key_value_heads": 3}, "num_attention_heads is 4, which num_key_value_heads, 3, does not divide"),
    ("granite", {"hidden_size": 20}, "hidden_size // num_attention_heads is 5; rope needs an even one"),
    ("qwen2moe", {"moe_intermediate_size": -1}, "moe_intermediate_size: Input should be greater than or equal to 1"),
    ("qwen2moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: Input should be greater"),
    ("qwen2moe with dense layers", {"intermediate_size": -2}, "intermediate_size: Input should be greater than or eq"),
    ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon: Input should be greater than 0 (got 0)"),
    ("gpt2", {"n_inner": -1}, "n_inner: Input should be greater than or equal to 1 (got -1)"),
    ("gptneox", {"layer_norm_eps": -1.0}, "layer_norm_eps: Input should be greater than 0 (got -1.0)"),
    ("gptneox", {"rotary_emb_base": 0}, "rotary_emb_base: Input should be greater than 0 (got 0)"),
    ("falcon new", {"num_kv_heads": 4}, "num_attention_heads is 6, which num_kv_heads, 4, does not divide"),
    ("deepseek3", {"n_group": 5}, "n_routed_experts is 8, which n_group, 5, does not divide"),
    ("deepseek3", {"topk_group": 5}, "topk_group is 5, more than n_group, 4"),
    ("phi3 longrope", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling.long_factor: Field"),
    (
        "phi3 from 4096 on",
        {"rope_parameters": {"type": "longrope", "short_factor": [1.0, -1.0], "long_factor": [1.0]}},
        "rope_parameters.short_factor.1: Input should be greater than 0 (got -1.0)",
    ),
    (
        "phi3 from 4096 on",
        {"rope_parameters": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_parameters.short_factor has 1 numbers; expected half of hidden_size // num_attention_heads, 12",
    ),
    (
        "mixtral stretched",
        {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
        "rope_parameters.factor: Input should be greater than or equal to 1 (got 0.5)",
    ),
    (
        "gemma3 with layer types",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": -1.0}}},
        "rope_parameters.sliding_attention.rope_theta: Input should be greater than 0 (got -1.0)",
    ),
    (
        "phi3 with older names",
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0], "factor": "4"}},
        "rope_scaling.factor is '4'; supported: a finite number above 0",
    ),
    ("phi3", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: Field required"),
    ("stablelm", {"head_dim": 24}, "head_dim is 24; supported: 12, hidden_size // num_attention_heads"),
    ("falcon new", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3; supported: 1, 2"),
    ("smollm3", {"no_rope_layers": []}, "no_rope_layers is []; supported: a list of 3 numbers"),
    ("llama with biases", {"attention_bias": False}, "self_attn.k_proj.bias does not belong to this architecture"),
    ("llama with biases", {"mlp_bias": False}, "mlp.down_proj.bias does not belong to this architecture"),
    ("mixtral", {"num_local_experts": None}, "whole number above 0; 8 is the family's: "),
    ("granite", {"intermediate_size": None}, "intermediate_size is None, expected a whole number above 0; 11008 is "),
    ("qwen3", {"attention_bias": True}, "self_attn.k_proj.bias is missing"),
    ("qwen2moe", {"qkv_bias": False}, "self_attn.k_proj.bias does not belong to this architecture"),
    ("stablelm", {"use_qkv_bias": False}, "self_attn.k_proj.bias does not belong to this architecture"),
]


@pytest.mark.parametrize(("case", "changes", "message"), BOUNDS)
def test_a_value_out_of_bounds_is_told_with_its_own_field(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refusal(family_folder(case, tmp_path / "m", **changes))


def fields_of(name: str, out: Path) -> list[str]:
    """The fields of its architecture that a case's file has."""
    found: list[str] = []

    def look(writer: gguf.GGUFWriter) -> None:
        found.extend(field for field in writer.kv_data[-1] if field.startswith(f"{writer.arch}."))

    family_file(name, out, look)
    return found


@pytest.mark.parametrize("name", [name for name in EACH.values() if name in FILES])
def test_a_wrong_value_in_a_file_is_told_with_its_field(name: str, tmp_path: Path) -> None:
    fields = [field for field in fields_of(name, tmp_path / "m.gguf") if field not in UNREAD_IN_FILES]
    assert len(fields) > 5
    for field in fields:

        def change(writer: gguf.GGUFWriter, field: str = field) -> None:
            writer.kv_data[-1][field] = gguf.GGUFValue(WRONG, gguf.GGUFValueType.STRING)

        with pytest.raises(CheckpointError) as error:
            open_source(family_file(name, tmp_path / "m.gguf", change)).check()
        assert field in str(error.value) and WRONG in str(error.value), str(error.value)


def test_a_norms_number_in_a_file_is_told_with_its_field(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[-1]["qwen3.attention.layer_norm_rms_epsilon"] = gguf.GGUFValue(-1.0, gguf.GGUFValueType.FLOAT32)

    with pytest.raises(CheckpointError) as error:
        open_source(family_file("qwen3", tmp_path / "m.gguf", change)).check()
    assert "m.gguf: qwen3.attention.layer_norm_rms_epsilon: Input should be greater than 0 (got -1.0)" in str(
        error.value
    )


@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe", "olmoe", "mixtral", "granitemoe"])
def test_a_file_that_says_no_score_means_a_softmax(name: str, tmp_path: Path) -> None:
    """As in llama.cpp, whose code has it for these architectures."""
    said = open_source(
        family_file(name, tmp_path / "0.gguf", lambda w: w.add_uint32(f"{w.arch}.expert_gating_func", 0))
    )
    assert said.config == open_source(family_file(name, tmp_path / "m.gguf")).config


def test_names_go_with_values_and_into_sentences() -> None:
    content, names = plain({"a": FieldValue({"b": FieldValue([1, 2], "x.y")}, "x"), "c": [FieldValue(3, "z")], "d": 4})
    assert content == {"a": {"b": [1, 2]}, "c": [3], "d": 4}
    assert told(("a", "b", 1), names) == "x.y.1"
    assert told(("a", "e"), names) == "x.e"
    assert (told(("c", 0), names), told(("d",), names)) == ("z", "d")
    assert reworded("a.b is 1, not a.bc; b", (), names) == "x.y is 1, not a.bc; b"
    assert reworded("b is 1", ("a",), names) == "x.y is 1"
