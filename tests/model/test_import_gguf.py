"""`import-gguf`: a small file written here comes back as the model and tokenizer that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from support import naive_decoder as naive
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_serve import LLM
from dsc_serve.model.checkpoint import load_tensors
from dsc_serve.model.config import CheckpointError, ModelConfig, load_config
from dsc_serve.model.gguf import import_gguf
from dsc_serve.model.gguf_families import INNER, OUTER
from dsc_serve.text.gguf_tokenizer import converted_tokenizer
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}"
TEXT = "Hello, wörld  42!\n"


def config(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 320,
        "norm_type": "rmsnorm",
        "mlp_gated": True,
        "hidden_act": "silu",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
    }
    return small_config("dense", **{**fields, **changes})


def byte_level_vocabulary() -> dict[str, Any]:
    words = [*byte_alphabet(), "He", "ll", "Hell", "Hello", "Ġw", "wh"]
    tokens = [*words, "<start>", "<end>"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 320)]
    kinds = [1] * len(words) + [3, 3] + [5] * (320 - len(words) - 2)
    ends = {"bos_token_id": len(words), "eos_token_id": len(words) + 1}
    merges = ["H e", "l l", "He ll", "Hell o", "Ġ w"]
    return {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "kinds": kinds, "merges": merges, **ends}


def sentencepiece_vocabulary() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁Helowrd,!42"]
    tokens += ["▁H", "el", "▁Hel", "lo", "▁Hello", "rl"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-100.0 - i for i in range(12)] + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    tokens += [f"<pad{i}>" for i in range(len(tokens), 320)]
    kinds += [5] * (320 - len(kinds))
    scores += [-1000.0] * (320 - len(scores))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "pre": "default", "tokens": tokens, "kinds": kinds, "scores": scores, **ends}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama files store q and k: a rotary pair's two rows next to each other."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


Change = Callable[[gguf.GGUFWriter], None]


def write(
    file: Path,
    tensors: dict[str, Tensor],
    model: ModelConfig,
    vocabulary: dict[str, Any],
    architecture: str = "llama",
    change: Change | None = None,
    quantised: bool = True,
    **options: Any,
) -> None:
    """A file of this model, its up projections in Q8_0 if `quantised`; options: of the library's writer."""
    writer = gguf.GGUFWriter(file, architecture, **options)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.ffn.size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_tokenizer_model(vocabulary["model"])
    if vocabulary["pre"] is not None:
        writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["kinds"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    for name in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        if name in vocabulary:
            add = writer.add_uint32 if vocabulary[name] >= 0 else writer.add_int32
            add(f"tokenizer.ggml.{name}", vocabulary[name])
    writer.add_chat_template(TEMPLATE)
    if change is not None:
        change(writer)
    outer, inner = ({ours: theirs for theirs, ours in names.items()} for names in (OUTER, INNER))
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if name in outer:
            writer.add_tensor(outer[name], values)
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        own, part = rest.rsplit(".", 1)
        if architecture == "llama" and own in ("self_attn.q_proj", "self_attn.k_proj"):
            values = neighbours(values, values.shape[0] // model.head_dim)
        if quantised and own == "mlp.up_proj" and part == "weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"blk.{layer}.{inner[own]}.{part}", quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.{layer}.{inner[own]}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the up projections as Q8_0 keeps them."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return {
        name: torch.tensor(dequantize(quantize(t.numpy(), kind), kind)) if name.endswith("up_proj.weight") else t
        for name, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False, "head_dim": 20}), ("qwen2", {"attention_bias": True})],
)
def test_a_model_comes_back(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = config(**changes)
    tensors = wide_tensors(model)
    write(tmp_path / "m.gguf", tensors, model, byte_level_vocabulary(), architecture)
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out", torch.float32)
    assert load_config(tmp_path / "out") == found
    ignored = {"norm_eps", "bos_token_id", "eos_token_id"}
    assert found.model_dump(exclude=ignored) == model.model_dump(exclude=ignored)
    assert found.norm_eps == pytest.approx(model.norm_eps)
    expected = rounded(tensors)
    stored = load_tensors([tmp_path / "out" / "model.safetensors"])
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    ids = [5, 9, 250, 2, 60, 14, 7]
    with LLM(str(tmp_path / "out"), dtype="float32") as llm:
        torch.testing.assert_close(
            llm.logits([ids])[0].double(), naive.logits(model, expected, ids), atol=2e-4, rtol=1e-4
        )


def test_weights_are_stored_in_bfloat16_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary())
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    stored = load_tensors([tmp_path / "out" / "model.safetensors"])
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_frequency_divisors_become_rope_scaling(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    change: Change = lambda writer: writer.add_tensor("rope_freqs.weight", divisors)  # noqa: E731
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary(), change=change)
    scaling = import_gguf(tmp_path / "m.gguf", tmp_path / "out").rope_scaling
    assert scaling is not None
    assert scaling.model_dump(exclude_defaults=True) == {"rope_type": "divisors", "divisors": divisors.tolist()}


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scale_linear": 1.0}, None),
    ],
    ids=str,
)
def test_linear_scaling_is_read_as_llama_cpp_reads_it(
    fields: dict[str, str | float], factor: float | None, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary(), change=rope(fields))
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    scaling = found.rope_scaling and found.rope_scaling.model_dump(exclude_defaults=True)
    assert scaling == (factor and {"rope_type": "linear", "factor": factor})
    assert found.max_position_embeddings == 48 * (factor or 1)


def rope(fields: dict[str, str | float]) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        for name, value in fields.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"llama.rope.{name}", value)  # type: ignore[arg-type]

    return change


def test_a_byte_level_tokenizer_comes_back_with_its_template(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary()
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None and tokenizer.chat_template is not None
    ids = tokenizer.encode(TEXT)
    tokens = vocabulary["tokens"]
    assert [tokens[i] for i in ids[:4]] == ["<start>", "Hello", ",", "Ġw"]
    assert tokenizer.decode(ids) == TEXT
    assert found.eos_token_ids == (tokenizer.eos_token_id,) == (tokens.index("<end>"),)
    rendered = tokenizer.chat_template.render([{"role": "user", "content": "Hello"}])
    assert [tokens[i] for i in tokenizer.encode_chat(rendered)] == ["<start>", "Hello", "<end>"]


def test_tokens_that_are_called_ends_are_ends(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary()
    vocabulary["tokens"][318:], vocabulary["kinds"][318:] = ["<|im_end|>", "<|endoftext|>"], [1, 3]
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert found.eos_token_ids == (vocabulary["eos_token_id"], 318, 319)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None and tokenizer.encode("<|im_end|>")[-1] == 318
    assert tokenizer.is_special(318) and tokenizer.is_special(319)


def test_a_sentencepiece_tokenizer_comes_back(tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    tokens = [vocabulary["tokens"][i] for i in ids]
    assert tokens == [
        *("<s>", "▁Hello", ",", "▁", "w", "<0xC3>", "<0xB6>", "rl", "d", "▁", "▁", "4", "2", "!", "<0x0A>"),
    ]
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("id", [320, 2**32 - 1, -1])
def test_special_tokens_that_the_file_does_not_have_count_for_none(id: int, tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary() | {"bos_token_id": id, "eos_token_id": id, "unknown_token_id": id}
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert (found.bos_token_id, found.eos_token_id) == (None, None)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)
    assert [vocabulary["tokens"][i] for i in tokenizer.encode("Hello")] == ["Hello"]


@pytest.mark.parametrize("id", [None, 320, -1])
def test_sentencepiece_s_own_special_tokens_stand_in_for_those_not_named(id: int | None, tmp_path: Path) -> None:
    vocabulary = {k: v for k, v in sentencepiece_vocabulary().items() if not k.endswith("_id")}
    if id is not None:
        vocabulary |= {"bos_token_id": id, "eos_token_id": id, "unknown_token_id": id}
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert (found.bos_token_id, found.eos_token_ids) == (1, (2,))
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("Hello")[0] == 1


@pytest.mark.parametrize("pre", [None, "default", "falcon3", "pixtral", "smaug-bpe", "tekken", "deepseek-llm"])
def test_a_file_with_or_without_a_name_for_its_cuts_comes_back(pre: str | None, tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary() | {"pre": pre}
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None
    begins = [vocabulary["bos_token_id"]] if pre in ("falcon3", "pixtral", "tekken") else []
    assert tokenizer.encode("Hello")[:-1] == begins
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("vocabulary", [byte_level_vocabulary(), sentencepiece_vocabulary()], ids=["bytes", "pieces"])
def test_named_tokens_are_marks_before_and_after_an_import(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    named = [vocabulary["tokens"][i] for name, i in vocabulary.items() if name.endswith("_id")]
    vocabulary = vocabulary | {"kinds": [1] * len(vocabulary["tokens"])}
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), vocabulary)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    imported, converted = Tokenizer.load(tmp_path / "out"), Tokenizer(converted_tokenizer(vocabulary)[0])
    assert imported is not None and len(named) > 1
    for token in named:
        ids = imported.encode(f"He{token}", add_special_tokens=False)
        assert ids == converted.encode(f"He{token}", add_special_tokens=False)
        assert ids[-1] == vocabulary["tokens"].index(token)
        assert imported.is_special(ids[-1]) and converted.is_special(ids[-1])


def refused_tensor(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, dtype=np.float32))


def scaled_twice(writer: gguf.GGUFWriter) -> None:
    rope({"scale_linear": 4.0})(writer)
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))


@pytest.mark.parametrize(
    ("architecture", "vocabulary", "change", "message"),
    [
        ("gemma", {}, None, "architecture 'gemma' is not supported; supported: deepseek2, falcon"),
        ("llama", {"pre": "kimi-k2"}, None, "tokenizer.ggml.pre 'kimi-k2' is not supported; supported: default"),
        ("llama", {"model": "rwkv"}, None, "tokenizer 'rwkv' is not supported; supported: gpt2, llama"),
        ("llama", {"kinds": [1]}, None, "token_type has 1 entries; expected 320"),
        ("llama", {}, lambda w: w.add_expert_count(4), "llama.expert_used_count is None, expected int"),
        ("llama", {}, lambda w: w.add_rope_dimension_count(8), "llama.rope.dimension_count is 8; supported: rotary"),
        ("llama", {}, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "type is 'longrope'; supp"),
        ("llama", {}, scaled_twice, "llama.rope.scale_linear is 4.0; supported: 1 in a file with rope_freqs"),
        ("llama", {}, refused_tensor, "tensor blk.0.attn_sinks.weight does not belong to this architecture"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    architecture: str, vocabulary: dict[str, Any], change: Change | None, message: str, tmp_path: Path
) -> None:
    own = {**byte_level_vocabulary(), **vocabulary}
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), own, architecture, change)
    with pytest.raises(CheckpointError) as error:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_gguf_or_cut_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary())
    whole = (tmp_path / "m.gguf").read_bytes()
    for content in (b"", b"not a model", json.dumps({}).encode(), *(whole[: len(whole) // n] for n in (50, 3, 2))):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            import_gguf(tmp_path / "bad.gguf", tmp_path / "out")
