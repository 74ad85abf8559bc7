"""GGUF files of Llama-form models, brought into the serving form: weights dequantised once, the tokenizer converted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config
from dsc_serve.text.gguf_tokenizer import ConversionError, converted_tokenizer, start_and_ends
from dsc_serve.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE

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


def import_gguf(file: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> ModelConfig:
    """Convert one GGUF file; dtype: of the stored weights. Raises CheckpointError."""
    reader = open_gguf(file)
    metadata = Metadata(reader, file)
    architecture = metadata.need("general.architecture", str)
    if architecture not in INTERLEAVED:
        raise CheckpointError(
            f"{file}: architecture {architecture!r} is not supported; supported: {', '.join(INTERLEAVED)}"
        )
    tensors = serving_tensors(reader, file, dtype)
    divisors = tensors.pop(DIVISORS, None)
    config = gguf_config(metadata, architecture, tensors, divisors)
    if INTERLEAVED[architecture]:
        for name, tensor in tensors.items():
            if ".q_proj." in name or ".k_proj." in name:
                tensors[name] = halves(tensor, config.head_dim)
    try:
        backend, settings = converted_tokenizer(metadata.tokenizer())
    except ConversionError as error:
        raise CheckpointError(f"{file}: {error}") from None
    save_checkpoint(config, tensors, out)
    backend.save(str(out / TOKENIZER_FILE))
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf8")
    return config


def open_gguf(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (ValueError, IndexError, KeyError, OSError) as error:  # what the library raises for a file cut short
        raise CheckpointError(f"{file}: not a readable GGUF file: {error}") from None


class Metadata:
    """The fields of a GGUF file."""

    def __init__(self, reader: GGUFReader, file: Path) -> None:
        self._fields, self.file = reader.fields, file

    def get(self, name: str) -> Any:
        field = self._fields.get(name)
        return None if field is None else field.contents()

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

    def tokenizer(self) -> dict[str, Any]:
        """The fields below `tokenizer.`, without that prefix and without `ggml.`."""
        names = [name for name in self._fields if name.startswith("tokenizer.")]
        return {name.removeprefix("tokenizer.").removeprefix("ggml."): self.get(name) for name in names}


def gguf_config(
    metadata: Metadata, architecture: str, tensors: Mapping[str, Tensor], divisors: Tensor | None
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
    metadata.refuse(f"{architecture}.expert_count", 0, "models without experts")
    metadata.refuse(f"{architecture}.attention.value_length", head_dim, "values of the keys' size")
    metadata.refuse(f"{architecture}.rope.dimension_count", head_dim, "rotary positions in all dimensions of a head")
    metadata.refuse(f"{architecture}.attention.sliding_window", context, "attention to the whole context")
    embedding = tensors.get("model.embed_tokens.weight")
    try:
        bos, eos = start_and_ends(metadata.tokenizer(), 0 if embedding is None else embedding.shape[0])
    except ConversionError as error:
        raise CheckpointError(f"{metadata.file}: {error}") from None
    fields = {
        "vocab_size": None if embedding is None else embedding.shape[0],
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "norm_type": "rmsnorm",
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(metadata, architecture, divisors),
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


def rope_scaling(metadata: Metadata, architecture: str, divisors: Tensor | None) -> dict[str, Any] | None:
    """Linear where no type is named, by the factor or by what older files call it, as llama.cpp reads them."""
    rope = f"{architecture}.rope."
    kind, name = f"{rope}scaling.type", f"{rope}scaling.factor"
    if metadata.get(kind) not in (None, "linear"):
        metadata.refuse(kind, "none", "none, linear, and llama3's scaling by rope_freqs")
    else:
        if metadata.get(name) is None:
            name = f"{rope}scale_linear"
        if metadata.get(name) not in (None, 0, 1):
            if divisors is not None:
                metadata.refuse(name, 1, "1 in a file with rope_freqs")
            return {"rope_type": "linear", "factor": metadata.need(name, (int, float))}
    return None if divisors is None else {"rope_type": "divisors", "divisors": divisors.tolist()}


def serving_tensors(reader: GGUFReader, file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in this dtype (divisors of angles: float32) under the serving form's name.

    Raises CheckpointError for a quantisation not known.
    """
    tensors = {}
    for stored in reader.tensors:
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise CheckpointError(f"{file}: tensor {stored.name} is quantised as {kind}, which is not known") from None
        own = torch.float32 if stored.name == DIVISORS else dtype
        tensors[serving_name(stored.name)] = torch.tensor(values, dtype=own)
    return tensors


def serving_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in INNER:
        return f"model.layers.{parts[1]}.{INNER[parts[2]]}.{parts[3]}"
    return name


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose rotary pairs are neighbours, put so that a pair is (i, i + head_dim / 2)."""
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
