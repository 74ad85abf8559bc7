"""A folder of cores as an adapter of a base: whatever in it would not act, or act otherwise, is an error."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dsc_kernels.weights import Core, LowRank, Pair, Update
from dsc_serve.adapter_choice import BrokenAdapterError
from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import Adapter, ModuleName
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.cores.files import CORES, SHOWN, StoredBasis, StoredCores, basis_file, read_basis, read_cores
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft.modules import Base, BaseModule
from dsc_serve.model.peft.reader import sha256
from dsc_serve.model.peft.tensors import Matrices


@dataclass(frozen=True, eq=False)
class BroughtBasis:
    """A basis in the serving form of a base."""

    stored: StoredBasis
    base: Base
    key: Hashable  # its digest, and its file as it is now

    @property
    def digest(self) -> str:
        return self.stored.digest

    def pairs(self) -> dict[ModuleName, Pair]:
        """Raises CheckpointError."""
        found = {}
        for name, pair in self.stored.read().items():
            for place, part in self.base.brought(self.base.modules[name], pair.up):
                found[place] = Pair(*alike(pair.down, part))
        return found


def holds_cores(folder: Path) -> bool:
    """Whether a folder's adapter stands on a basis."""
    try:
        return any(CORES.fullmatch(file.name) for file in folder.iterdir())
    except OSError:
        return False


def read_cored(folder: Path, config: ModelConfig, origin: Origin | None = None) -> Adapter:
    """The adapter in a folder, under the folder's name, for a base of this configuration; its basis is beside it.

    origin: the base's, see `ModelSource`. Raises BrokenAdapterError, in one line that names the file or the tensor and
    what is expected, and no path.
    """
    try:
        base, own = Base(config, origin), read_cores(folder)
        basis = basis_of(folder, own, base)
        modules = updates(own, basis.stored, base)
    except (CheckpointError, OSError) as error:
        told = str(error).replace(f"{folder}/", "").replace(f"{folder.parent}/", "")
        raise BrokenAdapterError(folder.name, told) from None
    sizes = {id(tensor): tensor.nbytes for one in modules.values() for tensor in tensors_of(one)}
    rank = max(one.rank for one in modules.values())
    digest = sha256(modules, own.basis)
    return Adapter(folder.name, digest, own.kind, modules, sum(sizes.values()), rank, basis=basis)


def tensors_of(one: Update) -> tuple[Tensor, ...]:
    return (one.matrix,) if isinstance(one, Core) else (one.down, one.up)


def find_basis(folder: Path, own: StoredCores) -> StoredBasis:
    """The basis beside an adapter's folder. Raises CheckpointError where it is not the one that the adapter names."""
    path = folder.parent / basis_file(own.basis)
    if not path.is_file():
        where = f"{path.name} must lie beside the adapter's folder"
        raise CheckpointError(f"its basis {own.basis[:SHOWN]} is missing: {where}")
    stored = read_basis(path)
    if stored.digest != own.basis:
        raise CheckpointError(f"basis {path.name} has changed: its digest is {stored.digest}, not {own.basis}")
    return stored


def basis_of(folder: Path, own: StoredCores, base: Base) -> BroughtBasis:
    """Raises CheckpointError where it is missing, changed, or of another base."""
    stored = find_basis(folder, own)
    for name, parts in stored.modules.items():
        module = base.modules.get(name)
        if module is None:
            raise base.refuse(name)
        given = parts["up"].shape[0], parts["down"].shape[1]
        if given != (module.out, module.into):
            expected = f"{[module.out, module.into]} is expected by the base"
            raise CheckpointError(f"{stored.path.name}: the pair of {name} is for {list(given)}; {expected}")
    told = stored.path.stat()
    return BroughtBasis(stored, base, (stored.digest, told.st_mtime_ns, told.st_size, told.st_ino))


def updates(own: StoredCores, basis: StoredBasis, base: Base) -> dict[ModuleName, Update]:
    """By module of the serving form. Raises CheckpointError."""
    modules: dict[ModuleName, Update] = {}
    for name in own.cores:
        if name not in basis.modules:
            known_in(base, name)
            raise CheckpointError(f"{own.path.name}: there is a core of {name}, of which its basis has nothing")
        core = Core(own.core(name, basis.ranks(name)))
        for place, _, _ in base.modules[name].parts:
            modules[place] = core
    for name in own.matrices:
        module, matrices = known_in(base, name), own.own(name)
        given = matrices.up.shape[0], matrices.down.shape[1]
        if given != (module.out, module.into):
            expected = f"{[module.out, module.into]} is expected by the base"
            raise CheckpointError(f"{own.path.name}: the matrices of {name} are for {list(given)}; {expected}")
        modules |= brought(base, module, matrices)
    return modules


def known_in(base: Base, name: str) -> BaseModule:
    """Raises CheckpointError for what is no module of the base's."""
    module = base.modules.get(name)
    if module is None:
        raise base.refuse(name)
    return module


def brought(base: Base, module: BaseModule, matrices: Matrices) -> dict[ModuleName, Update]:
    return {place: LowRank(*alike(matrices.down, part)) for place, part in base.brought(module, matrices.up)}


def alike(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """In one dtype: what a family multiplies becomes float32."""
    return (down, up) if down.dtype == up.dtype else (down.float(), up.float())
