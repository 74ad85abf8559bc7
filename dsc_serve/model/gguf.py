"""GGUF files of Llama-form models: weights dequantised once, the tokenizer converted."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsc_serve.gguf_file import Entry, GgufFile, open_gguf
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config
from dsc_serve.model.dequantise import FLOATS, UnknownKindError, dequantised, kind_of, stored_bytes
from dsc_serve.model.folder import EMBEDDING, write_source
from dsc_serve.model.rope import lengthened
from dsc_serve.model.source import ModelSource, Stored
from dsc_serve.text.gguf_tokenizer import ConversionError, converted_tokenizer, start_and_ends
from dsc_serve.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE

log = logging.getLogger(__name__)

# architecture → whether its rows of q and k lie interleaved, as rotary positions by neighbouring pairs want them
INTERLEAVED = {"llama": True, "qwen2": False}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DIVISORS = "rope_freqs.weight"
OTHER_TYPES = {
    "adapter": "; an adapter is no model by itself: merge it into its base, as llama-export-lora does",
    "mmproj": "; it belongs beside a model and is none",
}


def import_gguf(file: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> ModelConfig:
    """Convert one GGUF file; dtype: of the stored weights. Raises CheckpointError."""
    source = gguf_source(file)
    write_source(source, out, dtype)
    return source.config


def gguf_source(file: Path) -> ModelSource:
    """A GGUF file, or a split one by any of its parts, as it is: its tensors are read as float32.

    They count as stored in the dtype of the embedding, quantised ones as bfloat16. Raises CheckpointError.
    """
    content = open_gguf(file)
    metadata = Metadata(content)
    kind = metadata.get("general.type")
    if kind not in (None, "model"):
        raise CheckpointError(f"{file}: general.type is {kind!r}; supported: 'model'" + OTHER_TYPES.get(kind, ""))
    architecture = metadata.need("general.architecture", str)
    if architecture not in INTERLEAVED:
        raise CheckpointError(
            f"{file}: architecture {architecture!r} is not supported; supported: {', '.join(INTERLEAVED)}"
        )
    tensors = {serving_name(entry.name): stored(entry) for entry in content.tensors}
    divisors = tensors.pop(DIVISORS, None)
    config = gguf_config(metadata, architecture, tensors, None if divisors is None else divisors.read())
    if INTERLEAVED[architecture]:
        for name, own in tensors.items():
            if ".q_proj." in name or ".k_proj." in name:
                tensors[name] = replace(own, read=partial(in_halves, own, config.head_dim))
    kinds = {entry.kind for entry in content.tensors if OUTER.get(entry.name) == EMBEDDING}
    dtype = FLOATS.get(kind_of(kinds.pop()), torch.bfloat16) if kinds else torch.bfloat16
    return ModelSource(file, config, tensors, dtype, partial(text_files, content))


def text_files(content: GgufFile) -> dict[str, str]:
    """The tokenizer as the files that hold it in a folder. Raises CheckpointError."""
    try:
        backend, settings = converted_tokenizer(content.tokenizer)
    except ConversionError as error:
        raise CheckpointError(f"{content.path}: {error}") from None
    return {
        TOKENIZER_FILE: backend.to_str(pretty=True),
        CONFIG_FILE: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


class Metadata:
    """The fields of a GGUF file."""

    def __init__(self, content: GgufFile) -> None:
        self._fields, self.content, self.file = content.metadata, content, content.path

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    @property
    def names(self) -> Collection[str]:
        return self._fields.keys()

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field's value. Raises CheckpointError when it is missing or of another kind."""
        value = self.get(name)
        if not isinstance(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise CheckpointError(f"{self.file}: {name} is {value!r}, expected {wanted}")
        return value

    def refuse(self, name: str, neutral: Any, supported: str) -> None:
        value = self.get(name)
        if value is not None and value != neutral:
            raise CheckpointError(f"{self.file}: {name} is {value!r}; supported: {supported}")

    def checked(self, fields: dict[str, Any]) -> ModelConfig:
        return checked_config(fields, str(self.file))


def gguf_config(
    metadata: Metadata, architecture: str, tensors: Mapping[str, Stored], divisors: Tensor | None
) -> ModelConfig:
    """The configuration that a file's metadata and tensors describe. Raises CheckpointError."""

    def number(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}")
        return default if value is None else value

    width, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length")
    if head_dim is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        head_dim = width // heads
    context = number("context_length")
    scaling, served = rope_scaling(metadata, architecture, divisors, context)
    metadata.refuse(f"{architecture}.expert_count", 0, "models without experts")
    metadata.refuse(f"{architecture}.attention.value_length", head_dim, "values of the keys' size")
    metadata.refuse(f"{architecture}.rope.dimension_count", head_dim, "rotary positions in all dimensions of a head")
    metadata.refuse(f"{architecture}.attention.sliding_window", context, "attention to the whole context")
    embedding = tensors.get("model.embed_tokens.weight")
    try:
        bos, eos = start_and_ends(metadata.content.tokenizer, 0 if embedding is None else embedding.shape[0])
    except ConversionError as error:
        raise CheckpointError(f"{metadata.file}: {error}") from None
    fields = {
        "vocab_size": None if embedding is None else embedding.shape[0],
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": served,
        "norm_type": "rmsnorm",
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "attention_output_bias": "model.layers.0.self_attn.o_proj.bias" in tensors,
        "hidden_act": "silu",
        "mlp_gated": True,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": bos,
        "eos_token_id": eos or None,
        "ffn": {
            "kind": "dense",
            "size": number("feed_forward_length"),
            "bias": "model.layers.0.mlp.up_proj.bias" in tensors,
        },
    }
    return metadata.checked(fields)


def rope_scaling(
    metadata: Metadata, architecture: str, divisors: Tensor | None, context: Any
) -> tuple[dict[str, Any] | None, Any]:
    """The scaling of positions as llama.cpp computes it, and the context that linear scaling and YaRN give.

    Linear where no type is named, by the factor or by what older files call it. `attn_factor` multiplies cosines and
    sines whatever the type, YaRN's own besides.
    """
    rope = f"{architecture}.rope."
    kind, name = f"{rope}scaling.type", f"{rope}scaling.factor"
    if metadata.get(kind) not in (None, "linear", "yarn"):
        metadata.refuse(kind, "none", "none, linear, yarn, and llama3's scaling by rope_freqs")
    if metadata.get(name) is None:
        name = f"{rope}scale_linear"
    factor = metadata.get(name)
    if factor in (None, 0) or metadata.get(kind) == "none":
        factor = 1.0
    elif type(factor) not in (int, float):
        metadata.need(name, float)
    own = metadata.get(f"{rope}scaling.attn_factor")
    attention = 1.0 if own is None else metadata.need(f"{rope}scaling.attn_factor", float)
    if metadata.get(kind) == "yarn":
        if divisors is not None:
            metadata.refuse(kind, "none", "none in a file with rope_freqs")
        return yarn(metadata, rope, context, factor, attention)
    if divisors is not None:
        if factor != 1:
            metadata.refuse(name, 1, "1 in a file with rope_freqs")
        return {"rope_type": "divisors", "divisors": divisors.tolist(), "attention_factor": attention}, context
    if factor == attention == 1:
        return None, context
    scaling = {"rope_type": "linear", "factor": factor, "attention_factor": attention}
    return scaling, lengthened(context, factor) if type(context) is int else context


def yarn(metadata: Metadata, rope: str, context: Any, factor: float, attention: float) -> tuple[dict[str, Any], Any]:
    scaling = f"{rope}scaling."
    unused = [name for name in metadata.names if name.startswith(f"{scaling}yarn_")]
    if unused:
        log.warning("%s is not used, as llama.cpp does not use it for this architecture", ", ".join(unused))
    trained = metadata.get(f"{scaling}original_context_length") or context
    fields = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        "attention_factor": attention * (1 + 0.1 * math.log(max(factor, 1))),
    }
    if type(trained) is not int or type(context) is not int:
        return fields, context
    return fields, max(context, lengthened(trained, factor))


def stored(entry: Entry) -> Stored:
    """A tensor whose bytes are within its file. Raises CheckpointError for a quantisation not known."""
    named = f"{entry.file}: tensor {entry.name}"
    try:
        kind = kind_of(entry.kind)
        size = stored_bytes(kind, entry.shape, entry.big)
    except UnknownKindError as error:
        raise CheckpointError(f"{named} is quantised as {error}, which is not known") from None
    if entry.offset + size > entry.file.stat().st_size:
        raise CheckpointError(f"{entry.file}: not a readable GGUF file: it ends within tensor {entry.name}")
    read = lambda: dequantised(entry.read(size), kind, entry.shape, entry.big)  # noqa: E731
    return Stored(entry.shape, torch.float32, read)


def serving_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in INNER:
        return f"model.layers.{parts[1]}.{INNER[parts[2]]}.{parts[3]}"
    return name


def in_halves(own: Stored, head_dim: int) -> Tensor:
    """Rows of heads whose rotary pairs are neighbours, put so that a pair is (i, i + head_dim / 2)."""
    rows = own.read()
    if rows.shape[0] % head_dim:
        return rows  # which no configuration fits
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
