"""A folder of PEFT's form as an adapter of a base: whatever in it would not act, or act otherwise, is an error."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from dsc_kernels.weights import Core, LowRank, Update
from dsc_serve.adapter_choice import BrokenAdapterError
from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import Adapter, ModuleName
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft.config import AdapterConfig, read_config
from dsc_serve.model.peft.modules import Base, BaseModule
from dsc_serve.model.peft.tensors import AdapterTensors, bounded


def read_adapter(folder: Path, config: ModelConfig, origin: Origin | None = None) -> Adapter:
    """The adapter in a folder, under the folder's name, for a base of this configuration.

    origin: the base's, see `ModelSource`. Raises BrokenAdapterError, in one line that names the field or the tensor
    and what is expected, and no path.
    """
    try:
        base = Base(config, origin)
        claims = read_config(folder)
        modules = low_rank(AdapterTensors(folder, claims), claims, base)
    except (CheckpointError, OSError) as error:
        raise BrokenAdapterError(folder.name, str(error).replace(f"{folder}/", "")) from None
    content = sha256(modules)
    sizes = {id(tensor): tensor.nbytes for own in modules.values() for tensor in (own.down, own.up)}
    rank = max(own.rank for own in modules.values())
    return Adapter(folder.name, content, "lora", modules, sum(sizes.values()), rank)


def low_rank(tensors: AdapterTensors, claims: AdapterConfig, base: Base) -> dict[ModuleName, LowRank]:
    """The updates by module of the serving form. Raises CheckpointError."""
    if claims.fan_in_fan_out and not base.transposed:
        raise CheckpointError("fan_in_fan_out is True, but the base stores no matrix the other way round")
    named = check_claims(list(tensors.modules), claims, base)
    matrices = {own.name: tensors.read(own.name, own.out, own.into) for own in named}
    scales = {own.name: claims.scale_of(own.name) for own in named}
    bounded(matrices, scales)
    modules: dict[ModuleName, LowRank] = {}
    for own in named:
        down, up = matrices[own.name].down, matrices[own.name].up
        for key, part in base.brought(own, up):
            if part.dtype != down.dtype:  # what a family multiplies becomes float32
                down, part = down.float(), part.float()
            modules[key] = LowRank(down, part, scales[own.name])
    return modules


def check_claims(names: list[str], claims: AdapterConfig, base: Base) -> list[BaseModule]:
    """The base's modules of these names, which are exactly those that the configuration claims.

    Raises CheckpointError for a module that the base has not, or that the configuration does not name, or that it names
    and has no tensors, and for any part of the configuration that acts on nothing.
    """
    for name in names:
        own = base.modules.get(name)
        if own is None:
            raise base.refuse(name)
        if not claims.targets.takes(own):
            raise CheckpointError(f"there are tensors of {name}, which target_modules and its like do not name")
    missing = [name for name, own in base.modules.items() if name not in names and claims.targets.takes(own)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"target_modules and its like name {missing[0]}{more}, of which there are no tensors")
    for entry, matches in claims.targets.entries.items():
        if not any(matches(name) for name in base.modules):
            raise CheckpointError(f"target_modules names {entry!r}, which matches nothing in the base; leave it out")
    found = [base.modules[name] for name in names]
    unused = sorted(set(claims.targets.layers or ()) - {own.layer for own in found if own.layer is not None})
    if unused:
        raise CheckpointError(f"layers_to_transform names layer {unused[0]}, of which there are no tensors")
    for field, patterns in (("rank_pattern", claims.ranks), ("alpha_pattern", claims.alphas)):
        for pattern in patterns:
            if not any(pattern.matches(name) for name in names):
                raise CheckpointError(
                    f"{field} names {pattern.text!r}, which matches no module that there are tensors of"
                )
    return found


def sha256(modules: Mapping[ModuleName, Update], basis: str = "") -> str:
    """Of what an adapter does: modules, scales and numbers, whatever files and names they came in; basis: its own."""
    content = hashlib.sha256(basis.encode())
    for (layer, module), own in sorted(modules.items()):
        content.update(struct.pack("<i5sd", layer, module.encode(), own.scale))
        for tensor in (own.matrix,) if isinstance(own, Core) else (own.down, own.up):
            content.update(struct.pack("<2q", *tensor.shape) + str(tensor.dtype).encode())
            content.update(tensor.view(torch.uint8).numpy().data)
    return content.hexdigest()
