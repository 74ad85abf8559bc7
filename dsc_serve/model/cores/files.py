"""Bases and cores as files.

A folder of adapters holds `.basis-DIGEST.safetensors`, of each module its `down` and `up`; the folder of an adapter on
it holds `cores-DIGEST.safetensors`, with the core of each module and the matrices of those that have their own. DIGEST
is the beginning of the basis's.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsc_kernels.weights import Pair
from dsc_serve.adapter_choice import CORE_KINDS
from dsc_serve.files import CheckpointError
from dsc_serve.model.folder import stored_tensors
from dsc_serve.model.peft.config import MAX_RANK
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.model.source import STORED_DTYPES, Stored, check_finite
from dsc_serve.panics import PanicError, panics_as_errors

FORM = "1"  # of the files
SHOWN = 16  # digits of a digest, in names
LARGEST, LARGEST_CORE = 1e4, 1e12  # of their numbers: an update can overflow float32 with none of these
CORES = re.compile(rf"cores-([0-9a-f]{{{SHOWN}}})\.safetensors")
BASIS = re.compile(rf"\.basis-([0-9a-f]{{{SHOWN}}})\.safetensors")
MATRICES = ("down", "up")


def basis_file(digest: str) -> str:
    return f".basis-{digest[:SHOWN]}.safetensors"


def cores_file(digest: str) -> str:
    return f"cores-{digest[:SHOWN]}.safetensors"


def basis_beside(file: str) -> str | None:
    """The file beside an adapter's folder that a file in it needs."""
    match = CORES.fullmatch(file)
    return None if match is None else basis_file(match[1])


def digest_of(pairs: Mapping[str, Pair]) -> str:
    """sha256 of a basis, in hex: of modules' names, shapes and numbers."""
    content = hashlib.sha256()
    for name, pair in sorted(pairs.items()):
        for part, tensor in zip(MATRICES, pair, strict=True):
            content.update(f"{name}.{part}\0{tensor.dtype}".encode() + struct.pack("<2q", *tensor.shape))
            content.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()


@dataclass(frozen=True)
class Certified:
    """Of an update on a basis: its own spectral norm, and that of what the basis leaves out of it."""

    norm: float
    error: float

    @property
    def share(self) -> float:
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class StoredBasis:
    """A basis by the modules' names in the base. Of its matrices none has been read."""

    path: Path
    digest: str  # that it claims
    kind: str
    base: str  # what the base is called
    modules: Mapping[str, Mapping[str, Stored]]

    def ranks(self, module: str) -> tuple[int, int]:
        """(rank, inner) of a module's pair, as a core there is shaped."""
        own = self.modules[module]
        return own["up"].shape[1], own["down"].shape[0]

    def read(self) -> dict[str, Pair]:
        """Raises CheckpointError, also where the numbers are others than those of the digest."""
        pairs = {}
        for name, parts in self.modules.items():
            pairs[name] = Pair(*(bounded(f"{name}.{part}", parts[part], self.path, LARGEST) for part in MATRICES))
        if digest_of(pairs) != self.digest:
            raise CheckpointError(f"basis {self.path.name} has changed: its numbers are not those of its digest")
        return pairs


@dataclass(frozen=True)
class StoredCores:
    """What is an adapter's own."""

    path: Path
    basis: str  # digest
    kind: str
    base: str
    cores: Mapping[str, Stored]
    matrices: Mapping[str, Mapping[str, Stored]]  # A and B of modules that are not on the basis, the scale within B
    # By module what the basis leaves out; empty where it leaves nothing out
    certificate: Mapping[str, Certified] = field(default_factory=dict)

    def core(self, module: str, shape: tuple[int, int]) -> Tensor:
        """Raises CheckpointError where it has another shape, or numbers that cannot be meant."""
        name, own = f"{module}.core", self.cores[module]
        if own.shape != shape:
            expected = f"{list(shape)} is expected by its basis"
            raise CheckpointError(f"{self.path.name}: tensor {name} has shape {list(own.shape)}; {expected}")
        return bounded(name, own, self.path, LARGEST_CORE)

    def own(self, module: str) -> Matrices:
        """Raises CheckpointError where the two do not belong together."""
        parts = self.matrices[module]
        if parts.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{self.path.name}: of module {module} there is only {', '.join(parts)}")
        down, up = parts["lora_A"], parts["lora_B"]
        if len(down.shape) != 2 or len(up.shape) != 2 or not 1 <= down.shape[0] == up.shape[1] <= MAX_RANK:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise CheckpointError(f"{self.path.name}: the matrices of {module} have shapes {shapes}, of no rank")
        read = (bounded(f"{module}.{part}", parts[part], self.path, LARGEST_CORE) for part in ("lora_A", "lora_B"))
        return Matrices(*read)


def bounded(name: str, own: Stored, path: Path, largest: float) -> Tensor:
    """A tensor in float32 or bfloat16. Raises CheckpointError for one of another kind, or too large a number."""
    if own.dtype not in STORED_DTYPES:
        stored = str(own.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path.name}: tensor {name} is stored as {stored}; expected floating numbers")
    tensor = own.read()
    check_finite(name, tensor, path)
    if tensor.numel() and float(tensor.abs().max()) > largest:
        most = float(tensor.abs().max())
        raise CheckpointError(f"{path.name}: tensor {name} holds {most:.3g}; at most {largest:g} can be served")
    return (tensor if tensor.dtype == torch.bfloat16 else tensor.float()).contiguous()


def read_basis(path: Path) -> StoredBasis:
    """What a basis's file holds, shapes checked. Raises CheckpointError."""
    told, stored = metadata(path), stored_tensors([path])
    modules: dict[str, dict[str, Stored]] = {}
    for name, own in stored.items():
        module, _, part = name.rpartition(".")
        if part not in MATRICES or not module:
            raise CheckpointError(f"{path.name}: tensor {name} is no part of a basis")
        modules.setdefault(module, {})[part] = own
    for module, parts in modules.items():
        for part, axis in (("down", 0), ("up", 1)):
            if part not in parts:
                raise CheckpointError(f"{path.name}: tensor {module}.{part} is missing")
            shape = parts[part].shape
            if len(shape) != 2 or not 1 <= shape[axis] <= MAX_RANK:
                what = f"expected a matrix of rank 1 to {MAX_RANK}"
                raise CheckpointError(f"{path.name}: tensor {module}.{part} has shape {list(shape)}; {what}")
    return StoredBasis(path, told["digest"], told["kind"], told["base"], modules)


def read_cores(folder: Path) -> StoredCores:
    """What an adapter's folder holds of its own. Raises CheckpointError."""
    files = sorted(file.name for file in folder.iterdir() if CORES.fullmatch(file.name))
    if len(files) != 1 or (folder / "adapter_config.json").exists():
        others = [*files, *(["adapter_config.json"] if (folder / "adapter_config.json").exists() else [])]
        raise CheckpointError(f"the folder holds {' and '.join(others)}; one adapter is in each")
    path = folder / files[0]
    told = metadata(path)
    cores: dict[str, Stored] = {}
    matrices: dict[str, dict[str, Stored]] = {}
    for name, own in stored_tensors([path]).items():
        module, _, part = name.rpartition(".")
        if module and part == "core":
            cores[module] = own
        elif module and part in ("lora_A", "lora_B"):
            matrices.setdefault(module, {})[part] = own
        else:
            raise CheckpointError(f"{path.name}: tensor {name} is no part of an adapter on a basis")
    if both := sorted(cores.keys() & matrices.keys()):
        raise CheckpointError(f"{path.name}: module {both[0]} has a core and matrices of its own")
    if not cores and not matrices:
        raise CheckpointError(f"{path.name}: holds no tensors")
    if not told["digest"].startswith(CORES.fullmatch(path.name)[1]):  # type: ignore[index]  # it matched above
        raise CheckpointError(f"{path.name}: its metadata names another basis, {told['digest'][:SHOWN]}")
    certificate = certified(told["certificate"], path)
    return StoredCores(path, told["digest"], told["kind"], told["base"], cores, matrices, certificate)


def metadata(path: Path) -> dict[str, str]:
    """Raises CheckpointError for a file that cannot be read, or is none of these."""
    try:
        with panics_as_errors(), safe_open(path, framework="pt") as file:
            told: dict[str, str] = {"base": "", "certificate": "{}", **(file.metadata() or {})}
    except (SafetensorError, OSError, PanicError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from None
    if told.get("form") != FORM:
        raise CheckpointError(f"{path.name}: its form is {told.get('form')!r}; this version reads {FORM!r}")
    if told.get("kind") not in CORE_KINDS:
        raise CheckpointError(f"{path.name}: its kind is {told.get('kind')!r}; supported: {', '.join(CORE_KINDS)}")
    if not re.fullmatch("[0-9a-f]{64}", told.get("digest", "")):
        raise CheckpointError(f"{path.name}: its digest is {told.get('digest')!r}; expected 64 digits in hex")
    return told


def certified(text: str, path: Path) -> dict[str, Certified]:
    """Raises CheckpointError."""
    try:
        content: Any = json.loads(text)
        return {str(name): Certified(float(norm), float(error)) for name, (norm, error) in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path.name}: its certificate is not readable") from None


def write_basis(folder: Path, pairs: Mapping[str, Pair], kind: str, base: str) -> str:
    """Write a basis beside adapters' folders, whole or not at all; returns its digest."""
    digest = digest_of(pairs)
    told = {"form": FORM, "kind": kind, "digest": digest, "base": base}
    tensors = {f"{name}.{part}": own for name, pair in pairs.items() for part, own in zip(MATRICES, pair, strict=True)}
    save_whole(folder / basis_file(digest), tensors, told)
    return digest


def write_cores(
    folder: Path,
    basis: StoredBasis | tuple[str, str, str],
    cores: Mapping[str, Tensor],
    matrices: Mapping[str, Matrices] | None = None,
    certificate: Mapping[str, Certified] | None = None,
) -> None:
    """Write an adapter's own, whole or not at all. basis: it, or its digest, kind and base's name."""
    digest, kind, base = (basis.digest, basis.kind, basis.base) if isinstance(basis, StoredBasis) else basis
    tensors = {f"{name}.core": own for name, own in cores.items()}
    for name, own in (matrices or {}).items():
        tensors |= {f"{name}.lora_A": own.down, f"{name}.lora_B": own.up}
    told = {"form": FORM, "kind": kind, "digest": digest, "base": base}
    if certificate:
        told["certificate"] = json.dumps({name: [own.norm, own.error] for name, own in certificate.items()})
    save_whole(folder / cores_file(digest), tensors, told)


def save_whole(file: Path, tensors: Mapping[str, Tensor], told: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name.removeprefix('.')}.new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=told)
    new.replace(file)
