"""What no family can serve is refused by its name, with its value and what is supported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CASES, family_folder
from support.family_files import FILES, family_file
from support.window_families import YARN
from test_untrusted_folders import little_memory

from dsc_serve.model.architectures import ARCHITECTURES
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import CheckpointError
from dsc_serve.model.gguf_families import FAMILIES

OTHERS = {
    "GemmaForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma3",
    "CohereForCausalLM": "cohere",
    "MambaForCausalLM": "mamba",
    "GptOssForCausalLM": "gpt_oss",
    "T5ForConditionalGeneration": "t5",
}
Change = Callable[[gguf.GGUFWriter], None]


@pytest.mark.parametrize(("architecture", "model_type"), OTHERS.items())
def test_another_architecture_is_refused_with_those_that_are_supported(
    architecture: str, model_type: str, tmp_path: Path
) -> None:
    folder = family_folder("mixtral", tmp_path / "m", architectures=[architecture], model_type=model_type)
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    assert f"architecture '{architecture}' is not supported; supported: {', '.join(ARCHITECTURES)}" in str(error.value)


@pytest.mark.parametrize("architecture", ["gemma", "gemma3n", "command-r", "mamba", "gpt-oss", "t5"])
def test_a_file_of_another_architecture_is_refused_with_those_that_are_supported(
    architecture: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as error:
        open_source(tmp_path / "m.gguf")
    assert f"architecture '{architecture}' is not supported; supported: {', '.join(FAMILIES)}" in str(error.value)


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"sliding_window": "32"}, "sliding_window is '32', expected a whole number above 0"),
    ("mistral with a window", {"sliding_window": 0}, "sliding_window is 0, expected a whole number above 0"),
    ("qwen2 with windows", {"max_window_layers": -1}, "max_window_layers is -1; supported: a whole number of at least"),
    ("qwen2 with windows", {"use_sliding_window": "no"}, "use_sliding_window is 'no', expected true or false"),
    ("qwen2 with windows", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']; supported: a list"),
    (
        "qwen2 with layer types",
        {"layer_types": ["chunked"] * 3},
        "supported: a list of 3 names, each full_attention or",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; supported: False: each"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0; supported: above 0, or null"),
    ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping is '30', expected a number"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0; supported: above 0"),
    ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'; supported: gelu"),
    ("gemma2", {"sliding_window": -4}, "sliding_window is -4, expected a whole number above 0"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected a whole number above 0"),
    (
        "gemma3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_type is 'yarn'; supported: default, linear",
    ),
    (
        "gemma3 with layer types",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention.rope_type is 'linear'; supported: default",
    ),
    ("gemma3 with layer types", {"rope_parameters": 5}, "rope_parameters is 5; supported: an object"),
    ("deepseek2", {"q_lora_rank": 16}, "q_lora_rank is 16; supported: null: queries projected at once"),
    ("deepseek2", {"q_lora_rank": None}, "q_lora_rank is 1536; supported: null"),
    ("deepseek2", {"norm_topk_prob": True}, "norm_topk_prob is True; supported: False"),
    ("deepseek2", {"attention_bias": True}, "attention_bias is True; supported: False"),
    ("deepseek2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported: greedy, group_limited_greedy"),
    ("deepseek2", {"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
    (
        "deepseek2",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic'; supported: defau",
    ),
    ("deepseek2", {"kv_lora_rank": 23}, "kv_a_proj_with_mqa.weight has shape [32, 48], expected [31, 48]"),
    ("deepseek3", {"n_group": 3}, "n_routed_experts is 8, which n_group, 3, does not divide"),
    ("deepseek3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: 'sigmoid'"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts is None, expected a whole number above 0"),
    ("llama with biases", {"attention_bias": "no"}, "attention_bias is 'no', expected true or false"),
    ("llama with biases", {"mlp_bias": 1}, "mlp_bias is 1, expected true or false"),
    ("mixtral", {"num_local_experts": "5"}, "num_local_experts is '5', expected a whole number above 0"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than num_local_experts, 5"),
    ("mixtral", {"hidden_act": "relu"}, "hidden_act is 'relu'; supported: gelu, gelu_fast, gelu_new"),
    ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "the weights are quantised with awq"),
    ("granite", {"logits_scaling": 0}, "logits_scaling is 0.0; supported: any number but 0"),
    ("granite", {"residual_multiplier": "0.5"}, "residual_multiplier is '0.5', expected a number"),
    ("granite", {"mlp_bias": "no"}, "mlp_bias is 'no', expected true or false"),
    ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
    ("granitemoe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected a whole number above 0"),
    ("qwen3 with windows", {"sliding_window": 1.5}, "sliding_window is 1.5, expected a whole number"),
    ("qwen3moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
    ("qwen3moe", {"mlp_only_layers": "1"}, "mlp_only_layers is '1'; supported: a list of layers' numbers"),
    ("qwen3moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a whole number above 0"),
    ("qwen2moe", {"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
    ("qwen2moe", {"shared_expert_intermediate_size": "56"}, "shared_expert_intermediate_size: Input should be"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; supported: none"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0; supported: none"),
    ("phi3", {"sliding_window": True}, "sliding_window is True, expected a whole number above 0"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; supported: above 0, at most 1"),
    ("phi3", {"rope_scaling": {"type": "ntk"}}, "rope_scaling.type is 'ntk'; supported: default, linear"),
    ("phi3 longrope", {"rope_scaling": {"type": "longrope"}}, "short_factor: Field required"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]; supported: a list of 3 numbers, 1 where"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": []}, "sliding_window is [], expected a whole number"),
    ("gpt2", {"scale_attn_weights": "no"}, "scale_attn_weights is 'no', expected true or false"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx is 1, expected true or false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True; supported: False"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'; supported: gelu"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True; supported: False"),
    ("gptneox", {"rotary_pct": 0}, "rotary_pct is 0; supported: above 0, at most 1"),
    ("gptneox", {"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes', expected true or false"),
    ("falcon", {"alibi": True}, "alibi is True; supported: False: rotary positions"),
    # what no computation takes
    ("mixtral", {"rope_theta": 10**400}, "rope_theta is 1000000000"),
    ("granite", {"logits_scaling": 10**400}, "logits_scaling is 1000000000"),
    ("granite", {"residual_multiplier": float("nan")}, "residual_multiplier is nan, expected a finite number"),
    ("gemma2", {"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar is 1000000000"),
    ("gemma2", {"hidden_size": 10**400}, "hidden_size is 1000000000"),
    (
        "gemma3 with layer types",
        {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention.type is 'linear'; supported: default",
    ),
    ("deepseek2", {"topk_method": ["greedy"]}, "topk_method is ['greedy']; supported: greedy, group_limited_greedy"),
    ("deepseek3", {"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers is 1000000000; supported: a whole"),
    ("deepseek3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; supported: a whole number from"),
    ("deepseek3", {"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers is '1'; supported: a whole number from"),
    ("deepseek3", {"num_nextn_predict_layers": None, "num_mtp_layers": 65}, "num_mtp_layers is 65; supported: a whole"),
    *(
        ("deepseek2 stretched", {"rope_scaling": {**YARN, "mscale_all_dim": value}}, f"mscale_all_dim is {shown}")
        for value, shown in (
            ("0.7", "'0.7'"),
            ([1], "[1]"),
            (True, "True"),
            (-1, "-1"),
            (1e300, "1e+300"),
            (10**400, "1000"),
        )
    ),
]


@pytest.mark.parametrize(("case", "changes", "message"), FIELDS)
def test_a_field_that_is_not_supported_is_named(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        open_source(family_folder(case, tmp_path / "m", **changes)).check()
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "m" / "config.json"))


def test_a_field_of_every_family_is_tried() -> None:
    assert {CASES[case].config["model_type"] for case, _, _ in FIELDS} == {
        case.config["model_type"] for case in CASES.values()
    }


def scaled(kind: gguf.RopeScalingType) -> Change:
    return lambda writer: writer.add_rope_scaling_type(kind)


def replaced(field: str, add: Callable[[gguf.GGUFWriter, str], None]) -> Change:
    """A field of a file, written by `add` instead."""

    def change(writer: gguf.GGUFWriter) -> None:
        name = f"{writer.arch}.{field}"
        del writer.kv_data[-1][name]
        add(writer, name)

    return change


FILE_FIELDS: list[tuple[str, Change, str]] = [
    ("qwen3", lambda w: w.add_sliding_window(32), "qwen3.attention.sliding_window is 32; supported: attention to"),
    ("gemma3 stretched", scaled(gguf.RopeScalingType.YARN), "gemma3.rope.scaling.type is 'yarn'; supported: none, lin"),
    (
        "deepseek2",
        scaled(gguf.RopeScalingType.LINEAR),
        "deepseek2.rope.scaling.type is 'linear'; supported: none, yarn",
    ),
    ("deepseek2", lambda w: w.add_uint32("deepseek2.expert_gating_func", 3), "expert_gating_func is 3; supported: 1"),
    ("deepseek2", lambda w: w.add_rope_scaling_attn_factors(2.0), "rope.scaling.attn_factor is 2.0; supported: 1, for"),
    (
        "gemma2 by head size",
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)),
        "tensor rope_freqs.weight does not belong to this architecture",
    ),
    ("deepseek2", lambda w: w.add_q_lora_rank(8), "q_lora_rank is 8; supported: null"),
    ("mixtral", lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count is 4; supported: rotary pos"),
    ("mixtral", lambda w: w.add_expert_used_count(9), "llama.expert_used_count is 9, more than llama.expert_count, 5"),
    ("mixtral", lambda w: w.add_expert_group_count(4), "llama.expert_group_count is 4; supported: 1"),
    ("olmoe", lambda w: w.add_expert_weights_norm(True), "olmoe.expert_weights_norm is True; supported: False, for"),
    ("qwen3moe", lambda w: w.add_expert_weights_scale(2.5), "qwen3moe.expert_weights_scale is 2.5; supported: 1"),
    (
        "qwen2moe",
        lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
        "expert_gating_func is 2; supp",
    ),
    ("olmoe", lambda w: w.add_clamp_kqv(8.0), "olmoe.attention.clamp_kqv is 8.0; supported: 0, none"),
    ("falcon", lambda w: w.add_max_alibi_bias(8.0), "falcon.attention.max_alibi_bias is 8.0; supported: 0, none"),
    ("qwen3", lambda w: w.add_causal_attention(False), "qwen3.attention.causal is False; supported: True: each"),
    ("granitemoe", lambda w: w.add_expert_shared_feed_forward_length(8), "expert_shared_feed_forward_length is 8"),
    ("qwen3", scaled(gguf.RopeScalingType.LONGROPE), "qwen3.rope.scaling.type is 'longrope'; supported: none, lin"),
    ("phi3 longrope", scaled(gguf.RopeScalingType.YARN), "phi3.rope.scaling.type is 'yarn'; supported: none and lo"),
    (
        "deepseek2 stretched",
        replaced("rope.scaling.factor", lambda w, name: w.add_float64(name, 1e308)),
        "deepseek2.rope.scaling.original_context_length by deepseek2.rope.scaling.factor: Input should be less than",
    ),
    ("gemma2", lambda w: w.add_final_logit_softcapping(-1.0), "final_logit_softcapping is -1.0; supported: above 0"),
    ("gemma3", lambda w: w.add_attn_logit_softcapping(-1.0), "attn_logit_softcapping is -1.0; supported: above 0"),
    *(
        (
            "deepseek2 stretched",
            replaced("rope.scaling.yarn_log_multiplier", add),
            f"deepseek2.rope.scaling.yarn_log_multiplier is {shown}; supported: a number from 0 to 100",
        )
        for add, shown in (
            (lambda w, name: w.add_string(name, "0.1"), "'0.1'"),
            (lambda w, name: w.add_bool(name, True), "True"),
            (lambda w, name: w.add_float32(name, -1.0), "-1.0"),
            (lambda w, name: w.add_float32(name, float("nan")), "nan"),
            (lambda w, name: w.add_float32(name, 1e30), "1.0000000150474662e+30"),
        )
    ),
]


@pytest.mark.parametrize(("case", "change", "message"), FILE_FIELDS)
def test_a_field_of_a_file_that_is_not_supported_is_named(
    case: str, change: Change, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        open_source(family_file(case, tmp_path / "m.gguf", change)).check()
    assert message in str(error.value)


@pytest.mark.parametrize("count", [2**12 + 1, 10**9, 10**30])
@pytest.mark.parametrize("case", {case.config["model_type"]: name for name, case in CASES.items()}.values())
def test_a_giant_number_of_layers_is_refused_before_memory_is_taken(case: str, count: int, tmp_path: Path) -> None:
    name = "n_layer" if "n_layer" in CASES[case].config else "num_hidden_layers"
    folder = family_folder(case, tmp_path / "m", **{name: count})
    with little_memory(), pytest.raises(CheckpointError) as error:
        open_source(folder).check()
    assert re.search(rf"(n_layer|num_hidden_layers) is {count}\b|num_hidden_layers: .*{count}", str(error.value))


@pytest.mark.parametrize("case", [name for name in FILES if CASES[name].features or "gemma" in name])
def test_a_giant_number_of_layers_of_a_file_too(case: str, tmp_path: Path) -> None:
    change = replaced("block_count", lambda writer, name: writer.add_uint32(name, 2**31))
    with little_memory(), pytest.raises(CheckpointError, match=str(2**31)):
        open_source(family_file(case, tmp_path / "m.gguf", change)).check()


@pytest.mark.parametrize("part", ["k_b", "v_b"])
def test_what_makes_keys_and_values_has_its_shape_and_its_counterpart(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, own = gguf.GGUFWriter.add_tensor, f"blk.1.attn_{part}.weight"

    def without(writer: gguf.GGUFWriter, name: str, tensor: Any) -> None:
        if name != own:
            add(writer, name, tensor)

    def cut(writer: gguf.GGUFWriter, name: str, tensor: Any) -> None:
        add(writer, name, np.ascontiguousarray(tensor[:, :-1]) if name == own else tensor)

    def flat(writer: gguf.GGUFWriter, name: str, tensor: Any) -> None:
        add(writer, name, tensor[0] if name == own else tensor)

    for change, told in ((without, "is missing"), (cut, "has shape"), (flat, "has shape")):
        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", change)
        with pytest.raises(CheckpointError) as error:
            open_source(family_file("deepseek2", tmp_path / "m.gguf", newer=True)).check()
        assert f"tensor {own} {told}" in str(error.value)


def test_a_tensor_without_a_dot_in_its_name_is_named(tmp_path: Path) -> None:
    folder = family_folder("gemma2", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"norm": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor norm does not belong to this architecture"):
        open_source(folder).check()


def test_tensors_of_no_family_are_named(tmp_path: Path) -> None:
    folder = family_folder("qwen3", tmp_path / "m", architectures=["GraniteForCausalLM"], model_type="granite")
    with pytest.raises(CheckpointError, match=r"self_attn\.k_norm\.weight does not belong to this architecture"):
        open_source(folder).check()
