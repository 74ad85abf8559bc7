"""`import-hf`: folders of the Llama form become checkpoints of ours, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.small_models import small_config, wide_tensors
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

from dsc_serve.model.checkpoint import load_tensors
from dsc_serve.model.config import CheckpointError, load_config
from dsc_serve.model.huggingface import import_huggingface
from dsc_serve.model.rope import rope_table
from dsc_serve.text import tokenizer as text

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def expected_tensors(**changes: Any) -> dict[str, Tensor]:
    fields = {"norm_type": "rmsnorm", "mlp_gated": True, "num_key_value_heads": 1, "tie_word_embeddings": False}
    bias = changes.pop("mlp_bias", False)
    return wide_tensors(small_config("dense", {"bias": bias}, **{**fields, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A Hugging Face folder in two shards: `folder(tensors, field=value)`; a value of None leaves the field out."""

    def build(tensors: dict[str, Tensor], **changes: Any) -> Path:
        out = tmp_path / "model"
        out.mkdir()
        content = {name: value for name, value in {**LLAMA, **changes}.items() if value is not None}
        (out / "config.json").write_text(json.dumps(content))
        names = list(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, own in shards.items():
            save_file({name: tensors[name] for name in own}, out / file)
        weight_map = {name: file for file, own in shards.items() for name in own}
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return out

    return build


def test_shards_become_one_checkpoint_with_every_tensor(folder: Callable[..., Path], tmp_path: Path) -> None:
    tensors = expected_tensors()
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    config = import_huggingface(folder(tensors | buffer, rope_scaling=ROPE_LLAMA3), tmp_path / "out")
    stored = load_tensors([tmp_path / "out" / "model.safetensors"])
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert load_config(tmp_path / "out") == config
    assert (config.head_dim, config.rope_theta, config.norm_eps, config.mlp_gated) == (16, 500.0, 1e-5, True)
    assert config.rope_scaling is not None and config.rope_scaling.model_dump() == ROPE_LLAMA3


def test_the_newer_form_of_rope_and_the_head_of_a_tied_model(folder: Callable[..., Path], tmp_path: Path) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 2.0}
    tensors = expected_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = folder(tensors, tie_word_embeddings=True, rope_theta=None, rope_parameters=parameters)
    config = import_huggingface(source, tmp_path / "out")
    assert config.rope_theta == 700.0
    assert config.rope_scaling is not None and config.rope_scaling.rope_type == "yarn"
    assert config.rope_scaling.original_max_position_embeddings == 48
    assert "lm_head.weight" not in load_tensors([tmp_path / "out" / "model.safetensors"])


def test_dynamic_scaling_changes_nothing_within_the_context(folder: Callable[..., Path], tmp_path: Path) -> None:
    config = import_huggingface(
        folder(expected_tensors(), rope_scaling={"type": "dynamic", "factor": 2.0}), tmp_path / "out"
    )
    assert config.rope_scaling is not None and config.max_position_embeddings == 48
    assert torch.equal(rope_table(16, 48, 500.0, config.rope_scaling), rope_table(16, 48, 500.0))


@pytest.mark.parametrize(
    ("architecture", "said", "expected"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        ("LlamaForCausalLM", {}, (False, False, False)),
        ("MistralForCausalLM", {"sliding_window": 4096}, (False, False, False)),
        ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": False}, (True, False, False)),
    ],
)
def test_biases_are_where_the_architecture_has_them(
    architecture: str, said: dict[str, Any], expected: tuple[bool, ...], folder: Callable[..., Path], tmp_path: Path
) -> None:
    attention, output, mlp = expected
    tensors = expected_tensors(attention_bias=attention, attention_output_bias=output, mlp_bias=mlp)
    config = import_huggingface(folder(tensors, architectures=[architecture], **said), tmp_path / "out")
    assert (config.attention_bias, config.attention_output_bias, config.ffn.bias) == expected


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer_end", "bos", "ends"),
    [
        (None, {"bos_token_id": -1, "eos_token_id": -1}, None, None, ()),
        (None, {"bos_token_id": 61, "eos_token_id": 61}, None, None, ()),
        (None, {"bos_token_id": 1, "eos_token_id": [3, 61, -1]}, None, 1, (3,)),
        ([-1], {"bos_token_id": 0, "eos_token_id": 3}, None, 0, (3,)),
        ([100, 7], {"eos_token_id": 3}, None, None, (7,)),
        (None, {"eos_token_id": 3}, "<far>", None, (3,)),
        (None, {}, "<near>", None, (60,)),
    ],
)
def test_tokens_that_the_model_does_not_have_are_left_out(
    generation: list[int] | None,
    config: dict[str, Any],
    tokenizer_end: str | None,
    bos: int | None,
    ends: tuple[int, ...],
    folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = folder(expected_tensors(), **config)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if tokenizer_end is not None:
        vocab = {f"w{i}": i for i in range(60)} | {"<near>": 60, "<far>": 61}
        Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(source / "tokenizer.json"))
        (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": tokenizer_end}))
    found = import_huggingface(source, tmp_path / "out")
    assert (found.bos_token_id, found.eos_token_ids) == (bos, ends)
    kept = load_config(tmp_path / "out")
    assert (kept.bos_token_id, kept.eos_token_ids) == (bos, ends)
    if tokenizer_end is not None:
        before, after = text.Tokenizer.load(source), text.Tokenizer.load(tmp_path / "out")
        assert before is not None and after is not None
        assert before.eos_token_id == after.eos_token_id == vocab[tokenizer_end]


@pytest.mark.parametrize(
    ("generation", "config_eos", "expected"),
    [([3, 5], 7, (3, 5, 2)), (4, 7, (4, 2)), (None, [7, 2], (7, 2)), (None, 7, (7, 2)), (None, None, (2,))],
)
def test_end_of_text_of_generation_config_or_config_and_of_the_tokenizer(
    generation: Any, config_eos: Any, expected: tuple[int, ...], folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = folder(expected_tensors(), eos_token_id=config_eos)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<end>")])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert import_huggingface(source, tmp_path / "out").eos_token_ids == expected
    assert load_config(tmp_path / "out").eos_token_ids == expected
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "'GemmaForCausalLM' is not supported; supported: DeepseekV2ForCausalLM",
        ),
        ({"architectures": None}, "architecture None is not supported"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_scaling.rope_type is 'ntk'; supported: default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: Field required"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: gelu, gelu_fast, gelu_new"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised (quantization_config); supp"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window is -1, expected a whole"),
        (
            {"intermediate_size": None},
            "intermediate_size is None, expected a whole number above 0; 11008 is the family's",
        ),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.input_layernorm.weight does not belong"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], message: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        import_huggingface(folder(expected_tensors(), **changes), tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
