"""Checkpoint folders: `config.json` and `model.safetensors`, whole or sharded with an index."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsc_serve.config import DTYPES
from dsc_serve.model.config import CheckpointError, ModelConfig, load_config, read_json, save_config
from dsc_serve.model.decoder import Decoder, tensor_shapes
from dsc_serve.model.ffn import KINDS
from dsc_serve.panics import PanicError, panics_as_errors

log = logging.getLogger(__name__)

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError when there are none or one of a set is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = [folder / "model.safetensors"]
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
            raise CheckpointError(f"{file}: no such file")
    return files


def load_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files. Raises CheckpointError for a file that cannot be read."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with panics_as_errors(), safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118  not a mapping
                    if name in tensors:
                        raise CheckpointError(f"{file}: tensor {name} is stored twice")
                    tensors[name] = source.get_tensor(name)
        except (SafetensorError, OSError, PanicError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    return tensors


class OwnMemory(Mapping[str, Tensor]):
    """Tensors that are copied when they are asked for.

    Those of a file lie where the file is mapped: they would follow whoever writes to it, and a file that is cut off
    would end the process.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Every expected tensor is there with its shape, floating and finite, and no other. Raises CheckpointError."""
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    for names, what in ((missing, "is missing"), (unknown, "does not belong to this architecture")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{source}: tensor {names[0]} {what}{more}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
            )
        if tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{source}: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                "expected float32, bfloat16 or float16"
            )
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{source}: tensor {name} holds {bad} values that are not finite")


def check_count(config: ModelConfig, count: int, source: Path) -> None:
    """Raises CheckpointError where so few tensors cannot be this model's, before each that is missing is looked for."""
    layers, each = config.num_hidden_layers, len(KINDS[config.ffn.kind].shapes(config))
    if layers * each > count:
        needed = f"num_hidden_layers is {layers}, and the FFN of each has {each} tensors"
        raise CheckpointError(f"{source}: {needed}; the weights hold {count} tensors in all")


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (a CPU: AVX512-BF16 or AMX); without it float32 is faster."""
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
    if not has_native_bfloat16(device):
        return torch.float32
    if stored == torch.float16:
        log.warning("the float16 weights are rounded to bfloat16; with dtype float32 they are computed with as stored")
    return torch.bfloat16


def load_model(folder: Path, dtype: str, device: torch.device) -> Decoder:
    """Read, check and prepare a checkpoint. dtype: "auto", "float32" or "bfloat16". Raises CheckpointError."""
    config = load_config(folder)
    tensors = load_tensors(weight_files(folder))
    check_count(config, len(tensors), folder)
    check_tensors(tensors, tensor_shapes(config), folder)
    stored = tensors["model.embed_tokens.weight"].dtype
    try:
        return Decoder(config, OwnMemory(tensors), choose_dtype(dtype, stored, device), device)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def save_checkpoint(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; the tensors are checked first as loading would.

    Raises CheckpointError, also when the folder holds a checkpoint already: parts of the old one would stay.
    """
    taken = sorted(folder.glob("*.safetensors*")) + sorted(folder.glob("*.json"))
    if taken:
        raise CheckpointError(f"{folder}: holds a checkpoint already ({taken[0].name}); name an empty folder")
    check_tensors(tensors, tensor_shapes(config), folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_config(config, folder, str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."))
