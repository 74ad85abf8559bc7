"""Models at their paths, made ready to compute: folders of the serving form, of Hugging Face's, and GGUF files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from dsc_kernels import ops
from dsc_kernels.memory import trim
from dsc_kernels.quantised import ActivationBits
from dsc_serve.config import DTYPES
from dsc_serve.model.config import CheckpointError, ModelConfig, load_config, read_json
from dsc_serve.model.decoder import Decoder, tensor_shapes
from dsc_serve.model.exchange import ALONE, RankExchange
from dsc_serve.model.folder import (
    EMBEDDING,
    config_file,
    load_tensors,
    save_checkpoint,
    stored_tensors,
    text_files,
    weight_files,
)
from dsc_serve.model.gguf import gguf_source
from dsc_serve.model.huggingface import huggingface_source
from dsc_serve.model.origin import read_origin
from dsc_serve.model.quantised_folder import assembled
from dsc_serve.model.source import LoadingProgress, ModelSource
from dsc_serve.text.tokenizer import FILES
from dsc_serve.weight_forms import SMALL_ROUTERS, Forms, forms_of, part_of

__all__ = ["choose_dtype", "load_model", "load_tensors", "open_source", "save_checkpoint", "weight_files"]

log = logging.getLogger(__name__)


def own_source(folder: Path) -> ModelSource:
    """A folder of the serving form. Raises CheckpointError."""
    config = load_config(folder)
    tensors = assembled(stored_tensors(weight_files(folder)), config, folder)
    dtype = tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.float32
    said = read_json(config_file(folder)).get("torch_dtype")
    for narrow in (torch.bfloat16, torch.float16):  # where an import has multiplied weights, these are float32
        every = tensors.values()
        if str(narrow) == f"torch.{said}" and any(one.dtype == narrow or one.quantised is not None for one in every):
            dtype = narrow
    return ModelSource(folder, config, tensors, dtype, lambda: text_files(folder, FILES), read_origin(folder))


def is_own(path: Path) -> bool:
    """Whether a folder says that it is of the serving form. Raises CheckpointError where it holds no model."""
    if not path.is_dir():
        return False
    content = read_json(config_file(path))
    foreign = "architectures" in content and "ffn" not in content  # a form that is not named at all
    return bool(content.get("model_type", "" if foreign else "dsc") == "dsc")


# What a path is taken for: the first whose test holds.
SOURCES: tuple[tuple[Callable[[Path], bool], Callable[[Path], ModelSource]], ...] = (
    (Path.is_file, gguf_source),
    (is_own, own_source),
    (Path.is_dir, huggingface_source),
)


def open_source(path: Path) -> ModelSource:
    """The model at a path, of which no weight has been read yet. Raises CheckpointError, TokenizerError."""
    for takes, opened in SOURCES:
        if takes(path):
            return opened(path)
    raise CheckpointError(f"{path}: no such file or folder")


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster there than float32.

    It is where the device multiplies it in hardware (a CPU: AVX512-BF16 or AMX), and where native kernels widen it in
    registers: they read half the bytes. Plain torch is slower in it without that hardware.
    """
    if ops.widens_bfloat16(device):
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    supported = torch.cpu.get_capabilities()
    return bool(supported.get("avx512_bf16") or supported.get("amx_bf16") or supported.get("bf16"))


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: as named, or under "auto" the stored one where the device is fast in it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[DTYPES[name]]
    if stored == torch.float32:
        return torch.float32
    if not is_fast_in_bfloat16(device):
        return torch.float32
    if stored == torch.float16:
        log.warning("the float16 weights are rounded to bfloat16; with dtype float32 they are computed with as stored")
    return torch.bfloat16


def forms_for(config: ModelConfig, weights: str, keep: str) -> Forms:
    """The form of each part of a model. Raises KeepError."""
    present = {part for name in tensor_shapes(config) if (part := part_of(name)) is not None}
    kinds = [kind.ffn.kind for kind in config.kinds]
    ffn = next((kind for kind in kinds if kind in SMALL_ROUTERS), kinds[0])
    return forms_of(weights, keep, ffn, config.tie_word_embeddings, present)


ACTIVATION_BITS: dict[str, ActivationBits] = {"int16": 16, "int8": 8}


def load_model(
    path: Path,
    dtype: str,
    device: torch.device,
    context: int = 0,
    weights: str = "auto",
    keep: str = "",
    activations: str = "int16",
    exchange: RankExchange = ALONE,
) -> Decoder:
    """Read, check and prepare the model at a path, tensor by tensor. Raises CheckpointError, TokenizerError.

    dtype: "auto", "float32" or "bfloat16". context: positions to serve; 0: as many as the model is for. weights, keep,
    activations: as the settings say; raises KeepError for those that do not fit the model. exchange: with ranks
    that share the model, of which this one reads its part.
    """
    source = open_source(path)
    source.check()
    try:
        config = source.config.with_context(context)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config.max_position_embeddings > (most := source.config.longest_context):
        log.warning("context is %d; the model is for %d, and may write nonsense beyond", context, most)
    weights = source.auto_weights(dtype) if weights == "auto" else weights
    forms, computed = forms_for(config, weights, keep), choose_dtype(dtype, source.dtype, device)
    dequantised = set(forms.values()) == {"bfloat16"}  # then nothing is brought into our forms first
    with LoadingProgress(source) as progress:
        tensors = source.weights(progress) if dequantised else source.stored_weights(progress)
        try:
            model = Decoder(config, tensors, computed, device, forms, ACTIVATION_BITS[activations], exchange)
        except CheckpointError as error:
            message = str(error)
            raise CheckpointError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    model.origin = source.origin
    trim()
    return model
