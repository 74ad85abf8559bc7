"""GGUF files of the families in `gguf_families`: their tensors, dequantised or as stored, and the tokenizer converted.

What a file holds in few bits is held so, too, under the default `weights`, "auto"; in float32, it gives its values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.gguf_file import Entry, GgufFile, open_gguf
from dsc_serve.model.architectures import Settings
from dsc_serve.model.architectures.family import HEAD
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config
from dsc_serve.model.dequantise import FLOATS, UnknownKindError, dequantised, kind_of, stored_bytes
from dsc_serve.model.field_value import FieldValue, plain
from dsc_serve.model.folder import EMBEDDING, write_source
from dsc_serve.model.gguf_blocks import FORMS, quantised
from dsc_serve.model.gguf_families import OUTER, GgufFamily, family_of
from dsc_serve.model.gguf_metadata import FACTORS, Metadata, positions
from dsc_serve.model.origin import Origin
from dsc_serve.model.quantised_tensor import QuantisedTensor
from dsc_serve.model.rounding import OutOfRangeError
from dsc_serve.model.source import ModelSource, Stored
from dsc_serve.text.gguf_tokenizer import ConversionError, converted_tokenizer, start_and_ends
from dsc_serve.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE

BIAS = "model.layers.0.{}.bias"
NEUTRAL: dict[str, tuple[object, str]] = {  # what some architectures of GGUF files know and no family here
    "attention.causal": (True, "True: each token sees those before it"),
    "attention.clamp_kqv": (0, "0, none"),
    "attention.max_alibi_bias": (0, "0, none"),
    "attn_logit_softcapping": (0, "0, none"),
    "final_logit_softcapping": (0, "0, none"),
}
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
    """A GGUF file, or a split one by any of its parts, as it is: its tensors are read as float32, or as quantised.

    They count as stored in the dtype of the embedding, quantised ones as bfloat16. Raises CheckpointError.
    """
    content = open_gguf(file)
    metadata = Metadata(content)
    kind = metadata.get("general.type")
    if kind not in (None, "model"):
        raise CheckpointError(f"{file}: general.type is {kind!r}; supported: 'model'" + OTHER_TYPES.get(str(kind), ""))
    family = family_of(metadata)
    tensors = {family.serving_name(entry.name): stored(entry) for entry in content.tensors}
    factors = {name: tensors.pop(name).read() for name in FACTORS if name in tensors}
    settings = gguf_settings(metadata, family, tensors)
    config = gguf_config(metadata, family, settings, tensors, factors)
    tensors = family.tensors(tensors, settings, config)
    kinds = {entry.kind for entry in content.tensors if OUTER.get(entry.name) == EMBEDDING}
    dtype = FLOATS.get(kind_of(kinds.pop()), torch.bfloat16) if kinds else torch.bfloat16
    origin = Origin({**settings.content, "architectures": [family.architecture]}, file)
    return ModelSource(file, config, tensors, dtype, partial(text_files, content), origin, exact_in_float32=True)


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


def gguf_settings(metadata: Metadata, family: GgufFamily, tensors: Mapping[str, Stored]) -> Settings:
    """The metadata as a config of the family, but for positions, which are of llama.cpp's own kinds."""
    for field in ("embedding_length", "block_count", "attention.head_count"):
        metadata.need(metadata.name(field), int)
    if metadata.own("attention.key_length") is not None:
        metadata.need(metadata.name("attention.key_length"), int)
    embedding, width = tensors.get(EMBEDDING), metadata.read("feed_forward_length")
    content = {
        "vocab_size": FieldValue(words(embedding) or None, "rows of token_embd.weight"),
        "hidden_size": metadata.read("embedding_length"),
        "num_hidden_layers": metadata.read("block_count"),
        "num_attention_heads": metadata.read("attention.head_count"),
        "num_key_value_heads": metadata.read("attention.head_count_kv", metadata.own("attention.head_count")),
        "head_dim": metadata.head_size,
        "intermediate_size": width,
        "n_inner": width,
        "max_position_embeddings": metadata.read("context_length"),
        "rope_theta": metadata.read("rope.freq_base", 10000.0),
        "rotary_emb_base": metadata.read("rope.freq_base", 10000.0),
        "attention_bias": any(BIAS.format(f"self_attn.{part}") in tensors for part in ("q_proj", "qkv")),
        "bias": BIAS.format("self_attn.qkv") in tensors,
        "mlp_bias": BIAS.format("mlp.up_proj") in tensors,
        "tie_word_embeddings": HEAD not in tensors,
    }
    found, names = plain({**content, **family.settings(metadata, tensors)})
    told = {".".join(map(str, place)): name for place, name in names.items()}
    return Settings(found, metadata.file, told, complete=True)


def words(embedding: Stored | None) -> int:
    """Rows of the embedding; 0 where there is none, or one of no axes."""
    return embedding.shape[0] if embedding is not None and embedding.shape else 0


def gguf_config(
    metadata: Metadata,
    family: GgufFamily,
    settings: Settings,
    tensors: Mapping[str, Stored],
    factors: Mapping[str, Tensor],
) -> ModelConfig:
    """The configuration that a file's metadata and tensors describe. factors: of FACTORS. Raises CheckpointError."""
    head_dim = metadata.head_dim
    context, window = metadata.own("context_length"), metadata.own("attention.sliding_window")
    refused = {**NEUTRAL, "attention.value_length": (head_dim, "values of the keys' size")}
    if not (type(window) is int and (window == 0 or (type(context) is int and window >= context))):
        refused["attention.sliding_window"] = context, "attention to the whole context"
    for name, (neutral, supported) in refused.items():
        if name not in family.knows:
            metadata.refuse(metadata.name(name), neutral, supported)
    if "rope" in family.knows:
        metadata.refuse(metadata.name("rope.scaling.attn_factor"), 1.0, "1, for this architecture")
        for name in factors:
            raise CheckpointError(f"{metadata.file}: tensor {name} does not belong to this architecture")
    embedding = tensors.get(EMBEDDING)
    try:
        bos, eos = start_and_ends(metadata.content.tokenizer, words(embedding))
    except ConversionError as error:
        raise CheckpointError(f"{metadata.file}: {error}") from None
    fields = family.family.fields(settings)
    if fields.get("position_embedding_type") != "learned" and "rope" not in family.knows:
        fields |= positions(metadata, factors, family.longrope)
        turned = metadata.read("rope.dimension_count", head_dim)
        if not family.partial:
            name = metadata.name("rope.dimension_count")
            metadata.refuse(name, head_dim, "rotary positions in all dimensions of a head")
        fields["rotary_dim"] = None if turned.value == head_dim else turned
    rms = fields["norm_type"] == "rmsnorm"
    fields |= {
        "norm_eps": metadata.read("attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"),
        "bos_token_id": bos,
        "eos_token_id": eos or None,
    }
    if (
        BIAS.format("self_attn.qkv") not in tensors and fields.get("latent_size") is None
    ):  # which an architecture has or has not
        fields["attention_bias"] = BIAS.format("self_attn.q_proj") in tensors
        fields["attention_output_bias"] = BIAS.format("self_attn.o_proj") in tensors
    if fields["ffn"]["kind"] == "dense":
        fields["ffn"] = {**fields["ffn"], "bias": BIAS.format("mlp.up_proj") in tensors}
    return checked_config(fields, str(metadata.file))


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
    if kind not in FORMS or len(entry.shape) < 2:
        return Stored(entry.shape, torch.float32, read)

    def as_it_is() -> QuantisedTensor | None:
        try:
            return quantised(entry.read(size), kind, entry.shape, entry.big)
        except OutOfRangeError:
            return None

    return Stored(entry.shape, torch.float32, read, as_it_is)
