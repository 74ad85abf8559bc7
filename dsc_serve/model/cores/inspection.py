"""What a folder of cores holds, for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_kernels.weights import LowRank
from dsc_serve.files import CheckpointError
from dsc_serve.model.canonical import CanonicalForm
from dsc_serve.model.cores.files import SHOWN, StoredBasis, StoredCores, read_cores
from dsc_serve.model.cores.reader import find_basis
from dsc_serve.model.peft.inspection import certificate, contents, norms_by_kind, place, shown


@dataclass(frozen=True)
class InspectedCores:
    """An adapter by the modules' names in its files, each with its basis's matrices or its own."""

    own: StoredCores
    basis: StoredBasis
    modules: Mapping[str, LowRank]
    fan_in_fan_out: bool = False

    @property
    def base(self) -> str:
        return self.own.base

    @property
    def nbytes(self) -> int:
        """Without its basis's."""
        alone = sum(one.nbytes for one in self.modules.values() if one.core is None)
        return alone + sum(one.core.nbytes for one in self.modules.values() if one.core is not None)


def inspect_cores(folder: Path) -> InspectedCores:
    """What can be known without the base. Raises CheckpointError."""
    own = read_cores(folder)
    basis = find_basis(folder, own)
    pairs = basis.read()
    modules = {}
    for name in own.cores:
        if name not in pairs:
            raise CheckpointError(f"{own.path.name}: there is a core of {name}, of which its basis has nothing")
        modules[name] = LowRank(*pairs[name], core=own.core(name, basis.ranks(name)))
    for name in own.matrices:
        matrices = own.own(name)
        modules[name] = LowRank(matrices.down, matrices.up)
    return InspectedCores(own, basis, modules)


def report_cores(inspected: InspectedCores, forms: Mapping[str, CanonicalForm], atoms: int | None) -> Iterator[str]:
    """Lines about the adapter, its basis, and what that leaves out."""
    own, basis = inspected.own, inspected.basis
    ranks = sorted({rank for name in basis.modules for rank in basis.ranks(name)})
    size = basis.path.stat().st_size
    apart = f", {len(own.matrices)} with matrices of their own" if own.matrices else ""
    yield f"form      {own.kind}, for the base {own.base or 'of no name'!r}"
    yield f"basis     {own.basis[:SHOWN]}: {len(basis.modules)} modules, rank {shown(ranks)}, {size:,} bytes for all"
    yield f"modules   {len(inspected.modules)}, {len(own.cores)} on the basis{apart}"
    yield f"bytes     {inspected.nbytes:,} of its own in memory"
    shares = {name: one.share for name, one in own.certificate.items() if name in own.cores}
    if shares:
        worst = max(shares, key=shares.__getitem__)
        yield (
            f"error     left out of an update's norm {statistics.median(shares.values()):.2%} in the median, "
            f"{shares[worst]:.2%} at most ({worst.rpartition('.')[2]}, {place(worst)})"
        )
    else:
        yield "error     none: it was made on this basis"
    yield from norms_by_kind(forms)
    if atoms is not None:
        yield from certificate(forms, atoms)


def content_of_cores(
    inspected: InspectedCores, forms: Mapping[str, CanonicalForm], atoms: int | None
) -> dict[str, Any]:
    """The same for programs; error: the share of an update's spectral norm that the basis leaves out, where known."""
    own, modules = inspected.own, contents(inspected.modules, forms, atoms)
    for name, module in modules.items():
        module["on_basis"] = name in own.cores
        if name in own.certificate:
            module["error"] = own.certificate[name].share
    return {"kind": own.kind, "base": own.base, "basis": own.basis, "bytes": inspected.nbytes, "modules": modules}
