"""Checkpoint folders of Hugging Face's form, of any family in `architectures`, brought into the serving form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsc_serve.model.architectures import Settings, architecture_of
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config, read_json
from dsc_serve.model.folder import EMBEDDING, config_file, stored_tensors, text_files, weight_files, write_source
from dsc_serve.model.origin import Origin
from dsc_serve.model.source import ModelSource, Stored, commonest_dtype
from dsc_serve.text.tokenizer import FILES, Tokenizer

log = logging.getLogger(__name__)

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
    path = folder / "config.json"
    settings = Settings(read_json(path), path)
    config = huggingface_config(settings, None if tokenizer is None else tokenizer.eos_token_id)
    assumed = assumption(settings)
    try:
        tensors, dtype = mapped_tensors(folder, settings, config)
    except CheckpointError as error:
        raise CheckpointError(f"{assumed}{error}") from None
    tied = config.tie_word_embeddings and tie(tensors, folder)
    config = config.model_copy(update={"tie_word_embeddings": tied})
    texts = lambda: {} if tokenizer is None else text_files(folder, FILES)  # noqa: E731
    origin = Origin(settings.content, path)
    return ModelSource(folder, config, tensors, dtype, texts, origin, assumed=assumed)


def assumption(settings: Settings) -> str:
    """What a fault of the tensors may come from, to stand before it: sizes that the config leaves out."""
    expected = "expected a whole number above 0"
    each = [f"{name} is None, {expected}; {value} is the family's" for name, value in settings.assumed.items()]
    return f"{settings.path}: {', '.join(each)}: " if each else ""


def mapped_tensors(folder: Path, settings: Settings, config: ModelConfig) -> tuple[dict[str, Stored], torch.dtype]:
    """The tensors of a folder as its family has them in the serving form, and the dtype that most of it is stored in.

    What a family multiplies becomes float32, whatever that dtype is. Raises CheckpointError.
    """
    stored = stored_tensors(weight_files(folder))
    stored = {name: own for name, own in stored.items() if not name.endswith(BUFFERS)}
    return architecture_of(settings).tensors(stored, settings, config), commonest_dtype(stored)


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


def huggingface_config(settings: Settings, tokenizer_eos: int | None = None) -> ModelConfig:
    """A `config.json`, and the `generation_config.json` beside it, as a ModelConfig.

    tokenizer_eos: an end of text, too: models tuned for chats often inherit the other ends from what they were tuned
    from. Raises CheckpointError naming the field that does not fit and what is supported.
    """
    content, path = settings.content, settings.path
    architecture = architecture_of(settings)
    refuse_quantised(content, path)
    fields = architecture.fields(settings)
    size = fields["vocab_size"].value
    ends = known_tokens(generation_end(path.parent / "generation_config.json"), size)
    ends = ends or known_tokens(content.get("eos_token_id"), size)
    if tokenizer_eos not in ends:
        ends += known_tokens(tokenizer_eos, size)
    bos = known_tokens(content.get("bos_token_id"), size)
    tokens = {
        "bos_token_id": bos[0] if len(bos) == 1 else bos or None,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    return checked_config(fields | tokens, str(path))


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
