"""Checkpoint folders of Hugging Face's Llama form, brought into the serving form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dsc_serve.model.checkpoint import load_tensors, save_checkpoint, weight_files
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config, read_json
from dsc_serve.text.tokenizer import FILES, Tokenizer


@dataclass(frozen=True)
class Form:
    """What an architecture fixes in its code and not in its config.

    attention_bias: of q, k and v, None where `attention_bias` in the config says so for these and the output.
    window: the field that must hold for `sliding_window` to act, "" where it always acts, None where it never does.
    default_window: `sliding_window` in a config that does not have the field.
    """

    attention_bias: bool | None
    window: str | None
    default_window: int | None = None


FORMS = {
    "LlamaForCausalLM": Form(attention_bias=None, window=None),
    "MistralForCausalLM": Form(attention_bias=False, window="", default_window=4096),
    "Qwen2ForCausalLM": Form(attention_bias=True, window="use_sliding_window"),
}
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}


def import_huggingface(folder: Path, out: Path) -> ModelConfig:
    """Convert a folder of `config.json`, safetensors and tokenizer files. Raises CheckpointError, TokenizerError."""
    tokenizer = Tokenizer.load(folder)
    config = huggingface_config(folder, None if tokenizer is None else tokenizer.eos_token_id)
    tensors = load_tensors(weight_files(folder))
    save_checkpoint(config, serving_tensors(tensors, config), out)
    for name in FILES:
        if tokenizer is not None and (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return config


def huggingface_config(folder: Path, tokenizer_eos: int | None = None) -> ModelConfig:
    """A folder's `config.json` and `generation_config.json` as a ModelConfig.

    tokenizer_eos: an end of text, too: models tuned for chats often inherit the other ends from what they were tuned
    from. Raises CheckpointError naming the field that does not fit and what is supported.
    """
    path = folder / "config.json"
    content = read_json(path)
    architectures = content.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    form = FORMS.get(name) if isinstance(name, str) else None
    if form is None:
        raise CheckpointError(f"{path}: architecture {name!r} is not supported; supported: {', '.join(FORMS)}")
    _refuse_unsupported(content, form, path)
    size = content.get("vocab_size")
    ends = known_tokens(generation_end(folder / "generation_config.json"), size)
    ends = ends or known_tokens(content.get("eos_token_id"), size)
    if tokenizer_eos not in ends:
        ends += known_tokens(tokenizer_eos, size)
    bos = known_tokens(content.get("bos_token_id"), size)
    heads, width = content.get("num_attention_heads"), content.get("hidden_size")
    head_dim = content.get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_dim = width // heads
    bias = bool(content.get("attention_bias", False))
    theta, scaling = rope_fields(content, path)
    kv_heads = content.get("num_key_value_heads")
    fields = {
        **{key: content.get(key) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": content.get("max_position_embeddings"),
        "norm_type": "rmsnorm",
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": bias if form.attention_bias is None else form.attention_bias,
        "attention_output_bias": bias if form.attention_bias is None else False,
        "hidden_act": content.get("hidden_act", "silu"),
        "mlp_gated": True,
        "tie_word_embeddings": content.get("tie_word_embeddings", False),
        "bos_token_id": bos[0] if len(bos) == 1 else bos or None,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "ffn": {
            "kind": "dense",
            "size": content.get("intermediate_size"),
            "bias": form.attention_bias is None and content.get("mlp_bias", False),
        },
    }
    return checked_config(fields, str(path))


def known_tokens(value: Any, vocab_size: Any) -> list[Any]:
    """The token ids of a field, without those that the model does not have.

    People write -1 for none, and keep the ids of a larger vocabulary: such a token never comes. What is no id at all
    stays, to be refused by its name.
    """
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not isinstance(vocab_size, int):
        return values
    return [id for id in values if not isinstance(id, int) or 0 <= id < vocab_size]


def generation_end(path: Path) -> Any:
    """`eos_token_id` of `generation_config.json`, which goes before that of `config.json`. Raises CheckpointError."""
    return read_json(path).get("eos_token_id") if path.exists() else None


def _refuse_unsupported(content: Mapping[str, Any], form: Form, path: Path) -> None:
    if content.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config is given; supported: weights that are not quantised")
    if content.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"{path}: partial_rotary_factor is {content['partial_rotary_factor']!r}; supported: 1.0, all dimensions"
        )
    window, context = content.get("sliding_window", form.default_window), content.get("max_position_embeddings")
    acts = form.window == "" or (form.window is not None and bool(content.get(form.window)))
    if acts and isinstance(window, int) and isinstance(context, int) and window < context:
        raise CheckpointError(f"{path}: sliding_window is {window}, below the context of {context}; supported: none")


def rope_fields(content: Mapping[str, Any], path: Path) -> tuple[Any, dict[str, Any] | None]:
    """rope_theta and the scaling of a config, older (`rope_scaling`) or newer (`rope_parameters`)."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_scaling is {rope!r}, expected an object")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS:
        raise CheckpointError(f"{path}: rope_type {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; supported: 1.0")
    if not SCALINGS[kind]:  # up to max_position_embeddings, all that is served, dynamic scaling changes nothing
        return theta, None
    scaling = {name: rope[name] for name in SCALINGS[kind] if rope.get(name) is not None}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", content.get("max_position_embeddings"))
    return theta, {"rope_type": kind, **scaling}


def serving_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict without what is not stored: buffers of angles, and the head where it is the embedding."""
    idle = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {k: v for k, v in tensors.items() if k not in idle and not k.endswith("rotary_emb.inv_freq")}
