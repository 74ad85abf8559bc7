"""Checkpoint folders: `config.json` and `model.safetensors`, whole or sharded with an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsc_serve.documents import DocumentError, read_document
from dsc_serve.files import refuse_pointer
from dsc_serve.model.config import CheckpointError, ModelConfig, read_json, save_config
from dsc_serve.model.decoder import tensor_shapes
from dsc_serve.model.origin import write_origin
from dsc_serve.model.quantised_folder import Saved, apart
from dsc_serve.model.quantised_tensor import QuantisedTensor
from dsc_serve.model.source import LoadingProgress, ModelSource, Stored, check_finite, check_stored
from dsc_serve.panics import PanicError, panics_as_errors

EMBEDDING = "model.embed_tokens.weight"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError when there are none or one of a set is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():  # an index beside the whole is left from before the shards were joined
        files = [whole]
    else:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        files = [folder / name for name in sorted(set(shards.values()))]
        for file in files:
            if file.parent != folder:
                raise CheckpointError(f"{index}: weight_map names {file.name!r} outside the checkpoint's folder")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file{hint(folder)}")
    return files


def config_file(folder: Path) -> Path:
    """A folder's `config.json`. Raises CheckpointError that says what is there instead."""
    path = folder / "config.json"
    if path.is_file():
        return path
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: an adapter (adapter_config.json) of the model {base!r}, not a model; serve that "
            "with --adapters and the folder above this one"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{folder}: a folder of GGUF files; name the file, such as {ggufs[0]}")
    raise CheckpointError(f"{path}: no such file{hint(folder)}")


def hint(folder: Path) -> str:
    """What a folder without the safetensors files that were looked for holds instead."""
    other = sorted(file.name for file in folder.glob("*") if file.suffix in OTHER_WEIGHTS)
    if not other:
        return ""
    way = "safetensors.torch.save_file, or save_pretrained of transformers, makes them of these"
    return f"; the folder holds {other[0]}, and what is read are safetensors files: {way}"


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """The tensors of safetensors files, to be read. Raises CheckpointError for a file that cannot be read."""
    tensors: dict[str, Stored] = {}
    for file in files:
        refuse_pointer(file)
        try:
            with panics_as_errors():
                source: Any = safe_open(file, framework="pt")
                for name in source.keys():  # noqa: SIM118  not a mapping
                    if name in tensors:
                        raise CheckpointError(f"{file}: tensor {name} is stored twice")
                    part = source.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        what = f"tensor {name} is stored as {part.get_dtype()}, which is not known"
                        raise CheckpointError(f"{file}: {what}")
                    tensors[name] = Stored(tuple(part.get_shape()), dtype, partial(read_tensor, file, source, name))
        except (SafetensorError, OSError, PanicError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    return tensors


def read_tensor(file: Path, source: Any, name: str) -> Tensor:
    """A copy: what the library gives is the file's own pages, which change with the file. Raises CheckpointError."""
    try:
        with panics_as_errors():
            tensor: Tensor = source.get_tensor(name)
            return tensor.clone()
    except (SafetensorError, OSError, PanicError) as error:
        raise CheckpointError(f"{file}: tensor {name} is not readable: {error}") from None


def file_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself. Raises CheckpointError for a file that cannot be read."""
    refuse_pointer(file)
    try:
        with panics_as_errors(), safe_open(file, framework="pt") as source:
            return dict(source.metadata() or {})
    except (SafetensorError, OSError, PanicError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None


def load_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files. Raises CheckpointError for a file that cannot be read."""
    return {name: stored.read() for name, stored in stored_tensors(files).items()}


def text_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Those of these files that a folder holds. Raises CheckpointError for one that cannot be read."""
    texts = {}
    for name in names:
        if (folder / name).is_file():
            try:
                texts[name] = read_document(folder / name)
            except (OSError, DocumentError) as error:
                raise CheckpointError(f"{folder / name}: not readable: {error}") from None
    return texts


def save_checkpoint(
    config: ModelConfig,
    tensors: Mapping[str, Saved],
    folder: Path,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`; the tensors are checked first as loading would.

    What the configuration says of quantised tensors is what these are.

    source: the file or folder that they come from, which errors name. dtype: what the model is said to be stored in,
    the embedding's where none is given. Raises CheckpointError, also when the folder
    holds a checkpoint already: parts of the old one would stay.
    """
    refuse_taken(folder)
    named = source or folder
    found = {
        name: (tuple(t.shape), torch.float32 if isinstance(t, QuantisedTensor) else t.dtype)
        for name, t in tensors.items()
    }
    check_stored(found, tensor_shapes(config), named)
    stored, quantised = apart(tensors)
    for name, tensor in stored.items():
        if tensor.dtype.is_floating_point:
            check_finite(name, tensor, named)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = dtype or found[EMBEDDING][1]
    save_config(config.model_copy(update={"quantised": quantised}), folder, str(said).removeprefix("torch."))


def refuse_taken(folder: Path) -> None:
    """Raises CheckpointError for a folder that holds a checkpoint already."""
    taken = sorted(folder.glob("*.safetensors*")) + sorted(folder.glob("*.json"))
    if taken:
        raise CheckpointError(f"{folder}: holds a checkpoint already ({taken[0].name}); name an empty folder")


def write_source(source: ModelSource, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write what a source gives as a folder of the serving form, in this dtype where one is given.

    Raises CheckpointError, TokenizerError.
    """
    refuse_taken(out)
    source.check()
    texts = source.texts()
    with LoadingProgress(source) as progress:
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in source.weights(progress).items()}
    save_checkpoint(source.config, tensors, out, source.path, dtype or source.dtype)
    if source.origin is not None:
        write_origin(source.origin, out)
    for name, text in texts.items():
        (out / name).write_text(text, "utf8")
