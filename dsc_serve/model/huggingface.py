"""Checkpoint folders of Hugging Face's Llama form, brought into the serving form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config, read_json
from dsc_serve.model.folder import EMBEDDING, config_file, stored_tensors, text_files, weight_files, write_source
from dsc_serve.model.rope import lengthened
from dsc_serve.model.source import ModelSource, Stored
from dsc_serve.text.tokenizer import FILES, Tokenizer

log = logging.getLogger(__name__)


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
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
CONTEXT, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
HEAD = "lm_head.weight"
BUFFERS = "rotary_emb.inv_freq"  # which some older checkpoints store
UNQUANTISED = "supported: float32, bfloat16 and float16 weights, and GGUF files of any quantisation"


def import_huggingface(folder: Path, out: Path) -> ModelConfig:
    """Convert a folder of `config.json`, safetensors and tokenizer files. Raises CheckpointError, TokenizerError."""
    source = huggingface_source(folder)
    write_source(source, out)
    return source.config


def huggingface_source(folder: Path) -> ModelSource:
    """A folder of `config.json`, safetensors and tokenizer files as it is. Raises CheckpointError, TokenizerError."""
    config_file(folder)
    tokenizer = Tokenizer.load(folder)
    config = huggingface_config(folder, None if tokenizer is None else tokenizer.eos_token_id)
    tensors = stored_tensors(weight_files(folder))
    tensors = {name: stored for name, stored in tensors.items() if not name.endswith(BUFFERS)}
    tied = config.tie_word_embeddings and tie(tensors, folder)
    config = config.model_copy(update={"tie_word_embeddings": tied})
    dtype = tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.float32
    return ModelSource(folder, config, tensors, dtype, lambda: {} if tokenizer is None else text_files(folder, FILES))


def tie(tensors: dict[str, Stored], folder: Path) -> bool:
    """Leave out the head where it is the embedding, whichever of both is stored.

    Returns whether it is: a head that differs from the embedding is one of its own, whatever the config says, as in
    transformers. Raises CheckpointError.
    """
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None:
        return True
    if embedding is None:
        tensors[EMBEDDING] = tensors.pop(HEAD)
        return True
    if head.shape != embedding.shape or not torch.equal(head.read().float(), embedding.read().float()):
        log.warning(
            "%s: tie_word_embeddings is true, but %s differs from %s; each is used for what it is",
            *(folder, HEAD, EMBEDDING),
        )
        return False
    del tensors[HEAD]
    return True


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
    theta, scaling, context = rope_fields(content, path)
    kv_heads = content.get("num_key_value_heads")
    fields = {
        **{key: content.get(key) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
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
    refuse_quantised(content, path)
    if content.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"{path}: partial_rotary_factor is {content['partial_rotary_factor']!r}; supported: 1.0, all dimensions"
        )
    window, context = content.get("sliding_window", form.default_window), content.get("max_position_embeddings")
    acts = form.window == "" or (form.window is not None and bool(content.get(form.window)))
    if acts and isinstance(window, int) and isinstance(context, int) and window < context:
        raise CheckpointError(f"{path}: sliding_window is {window}, below the context of {context}; supported: none")


def refuse_quantised(content: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError where a config, or a file beside it, says that the weights are quantised."""
    for field in ("quantization_config", "compression_config", "quantization"):
        own = content.get(field)
        if own is not None:
            method = own.get("quant_method", own.get("mode", "")) if isinstance(own, dict) else own
            named = f" with {method}" if method else ""
            raise CheckpointError(f"{path}: the weights are quantised{named} ({field}); {UNQUANTISED}")
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if (path.parent / name).is_file():
            raise CheckpointError(f"{path.parent / name}: the weights are quantised, as this file says; {UNQUANTISED}")


def rope_fields(content: Mapping[str, Any], path: Path) -> tuple[Any, dict[str, Any] | None, Any]:
    """rope_theta, the scaling, and the context that it gives, of an older config (`rope_scaling`) or a newer one.

    As transformers reads them: `rope_scaling` goes before `rope_parameters`, what stands in it before what stands
    beside it, and only an `original_max_position_embeddings` beside it before the one within. As in vLLM, linear
    scaling and YaRN multiply the context that the model was trained with.
    """
    rope, context = content.get("rope_scaling") or content.get("rope_parameters") or {}, content.get(CONTEXT)
    if isinstance(rope, dict) and isinstance(
        rope.get("full_attention"), dict
    ):  # by the layers' kinds, of which one is served
        rope = rope["full_attention"]
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_scaling is {rope!r}, expected an object")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise CheckpointError(f"{path}: rope_type {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; supported: 1.0")
    if kind == "default":
        return theta, None, context
    scaling = {name: rope[name] for name in SCALINGS[kind] if rope.get(name) is not None}
    if ORIGINAL in SCALINGS[kind]:
        original = content.get(ORIGINAL)
        if original is not None:
            scaling[ORIGINAL] = original
        scaling.setdefault(ORIGINAL, context)
    trained: Any = context
    if kind == "yarn":
        trained = scaling[ORIGINAL]
        if "factor" not in scaling and is_size(context) and is_size(trained):
            scaling["factor"] = context / trained
    factor = scaling.get("factor")
    if kind in ("linear", "yarn") and is_size(trained) and isinstance(factor, int | float):
        context = lengthened(trained, factor)
    return theta, {"rope_type": kind, **scaling}, context


def is_size(value: object) -> bool:
    return type(value) is int and value > 0
