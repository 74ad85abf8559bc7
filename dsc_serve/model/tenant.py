"""Tenants of a model's bank as files: a router's bias and a scale of their own for each layer, in a folder each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsc_serve.adapter_choice import BrokenAdapterError
from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import Adapter, BankTenant
from dsc_serve.model.config import DscConfig, ModelConfig
from dsc_serve.model.folder import file_metadata, stored_tensors
from dsc_serve.model.source import check_finite

FILE = "dsc_adapter.safetensors"
KIND, BANK = "dsc", "bank"  # what the file's metadata say: the kind, and the bank that it is for
BIAS, GAMMA = "b", "gamma"


def bank_of(config: ModelConfig) -> tuple[int, DscConfig] | None:
    """How many layers of a model have a bank, and what these are; None: it has none."""
    found = [kind.ffn for kind in config.layers if isinstance(kind.ffn, DscConfig)]
    return (len(found), found[0]) if found else None


def holds_tenant(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_tenant(folder: Path, config: ModelConfig) -> Adapter:
    """The tenant in a folder, under the folder's name. Raises BrokenAdapterError, in one line without a path."""
    try:
        tenant = checked_tenant(folder / FILE, config)
    except (CheckpointError, OSError) as error:
        raise BrokenAdapterError(folder.name, str(error).replace(f"{folder}/", "")) from None
    return Adapter(folder.name, digest_of(tenant), KIND, {}, tenant.nbytes, 0, tenant=tenant)


def checked_tenant(path: Path, config: ModelConfig) -> BankTenant:
    """Raises CheckpointError for what does not fit the model."""
    bank = bank_of(config)
    if bank is None:
        raise CheckpointError(f"{path}: a tenant of a bank, and the model has none; `dsc-serve graft` makes it one")
    (layers, ffn), said = bank, file_metadata(path)
    if said.get("kind") != KIND:
        raise CheckpointError(f"{path}: kind is {said.get('kind')!r} in its metadata; expected {KIND!r}")
    if said.get(BANK, "") != ffn.bank:
        raise CheckpointError(f"{path}: it is of the bank {said.get(BANK, '')!r}; the model has {ffn.bank!r}")
    stored = stored_tensors([path])
    expected = {BIAS: (layers, ffn.num_atoms), GAMMA: (layers, config.hidden_size if ffn.gamma == "vector" else 1)}
    if stored.keys() != expected.keys():
        raise CheckpointError(f"{path}: holds {', '.join(sorted(stored)) or 'nothing'}; expected {BIAS} and {GAMMA}")
    for name, shape in expected.items():
        own = stored[name]
        if own.shape != shape or own.dtype != torch.float32:
            given = f"{str(own.dtype).removeprefix('torch.')} {list(own.shape)}"
            raise CheckpointError(f"{path}: tensor {name} is {given}, expected float32 {list(shape)}")
    found = {name: stored[name].read() for name in expected}
    for name, tensor in found.items():
        check_finite(name, tensor, path)
    return BankTenant(found[BIAS], found[GAMMA].expand(layers, config.hidden_size).contiguous())


def digest_of(tenant: BankTenant) -> str:
    """Of what a tenant does, whatever it is called."""
    return sha256(KIND, {BIAS: tenant.bias, GAMMA: tenant.gamma})


def sha256(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """In hex, of tensors by name."""
    content = hashlib.sha256(kind.encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def write_tenant(folder: Path, bias: Tensor, gamma: Tensor, bank: str) -> None:
    """Write one of the bank of this name, whole or not at all. bias [layers, M], gamma [layers, d] or [layers, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{FILE}.new"
    tensors = {BIAS: bias.detach().float().contiguous(), GAMMA: gamma.detach().float().contiguous()}
    save_file(tensors, new, metadata={"format": "pt", "kind": KIND, BANK: bank})
    new.replace(folder / FILE)
