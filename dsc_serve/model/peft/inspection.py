"""What an adapter's folder holds, for people."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_kernels.weights import LowRank
from dsc_serve.files import CheckpointError
from dsc_serve.model.canonical import CanonicalForm, canonical
from dsc_serve.model.peft.config import AdapterConfig, read_config
from dsc_serve.model.peft.targets import Named
from dsc_serve.model.peft.tensors import AdapterTensors, Matrices, bounded
from dsc_serve.model.peft.writer import write_adapter

NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Inspected:
    """An adapter by the modules' names in its files."""

    claims: AdapterConfig
    modules: Mapping[str, LowRank]

    @property
    def nbytes(self) -> int:
        return sum(own.nbytes for own in self.modules.values())

    @property
    def base(self) -> str:
        return self.claims.base

    @property
    def fan_in_fan_out(self) -> bool:
        return self.claims.fan_in_fan_out


def inspect_adapter(folder: Path) -> Inspected:
    """What can be known without the base. Raises CheckpointError."""
    claims = read_config(folder)
    tensors = AdapterTensors(folder, claims)
    found: dict[str, Matrices] = {}
    for name in tensors.modules:
        layer = NUMBER.search(name)
        if not claims.targets.takes(Named(name, int(layer[1]) if layer else None)):
            raise CheckpointError(f"there are tensors of {name}, which target_modules and its like do not name")
        found[name] = tensors.read(name, *tensors.sizes(name))
    scales = {name: claims.scale_of(name) for name in found}
    bounded(found, scales)
    return Inspected(claims, {name: LowRank(own.down, own.up, scales[name]) for name, own in found.items()})


def report(inspected: Inspected, forms: Mapping[str, CanonicalForm], atoms: int | None) -> Iterator[str]:
    """Lines about the adapter, one for each kind of module, strongest layers named."""
    ranks = sorted({own.rank for own in inspected.modules.values()})
    scales = sorted({own.scale for own in inspected.modules.values()})
    yield f"form      {inspected.claims.form}, for the base {inspected.claims.base or 'of no name'!r}"
    yield f"modules   {len(inspected.modules)}, ranks {shown(ranks)}, scales {shown(scales)}"
    yield f"bytes     {inspected.nbytes:,} in memory"
    yield from norms_by_kind(forms)
    if atoms is not None:
        yield from certificate(forms, atoms)


def norms_by_kind(forms: Mapping[str, CanonicalForm]) -> Iterator[str]:
    yield "spectral norms of the updates, by kind of module:"
    for kind, names in by_kind(forms).items():
        norms = {name: forms[name].norm for name in names}
        weakest, strongest = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
        median = statistics.median(norms.values())
        yield (
            f"  {kind}: {len(names)} modules, {norms[weakest]:.4g} ({place(weakest)}) to {norms[strongest]:.4g} "
            f"({place(strongest)}), median {median:.4g}"
        )


def content(inspected: Inspected, forms: Mapping[str, CanonicalForm], atoms: int | None) -> dict[str, Any]:
    """The same for programs."""
    claims, modules = inspected.claims, contents(inspected.modules, forms, atoms)
    return {"kind": claims.form.lower(), "base": claims.base, "bytes": inspected.nbytes, "modules": modules}


def contents(
    modules: Mapping[str, LowRank], forms: Mapping[str, CanonicalForm], atoms: int | None
) -> dict[str, dict[str, Any]]:
    """Of each module rank, scale and spectral norm, and what the strongest atoms leave out."""
    return {
        name: {"rank": own.rank, "scale": own.scale, "norm": forms[name].norm}
        | ({} if atoms is None else {"left_out": forms[name].left_out(atoms)})
        for name, own in modules.items()
    }


def certificate(forms: Mapping[str, CanonicalForm], atoms: int) -> Iterator[str]:
    """What the strongest atoms of every module leave out."""
    yield f"the {atoms} strongest atoms of each module leave out exactly, in the spectral norm:"
    for kind, names in by_kind(forms).items():
        left = {name: forms[name].left_out(atoms) for name in names}
        worst = max(left, key=left.__getitem__)
        shares = [left[name] / forms[name].norm if forms[name].norm else 0.0 for name in names]
        share = f"{statistics.median(shares):.1%} in the median, {max(shares):.1%} at most"
        yield f"  {kind}: at most {left[worst]:.4g} ({place(worst)}); of the update's own norm {share}"


def canonical_forms(modules: Mapping[str, LowRank]) -> dict[str, CanonicalForm]:
    return {name: canonical(own) for name, own in modules.items()}


def write_kept(base: str, fan_in_fan_out: bool, forms: Mapping[str, CanonicalForm], atoms: int, out: Path) -> None:
    """Write the adapter of the strongest atoms alone, in PEFT's form. Raises CheckpointError."""
    kept = {name: Matrices(*form.kept(atoms)) for name, form in forms.items()}
    write_adapter(out, base, float(atoms), kept, fan_in_fan_out)


def by_kind(modules: Mapping[str, object]) -> dict[str, list[str]]:
    """Modules' names by their last part."""
    kinds: dict[str, list[str]] = {}
    for name in modules:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return kinds


def place(name: str) -> str:
    layer = NUMBER.search(name)
    return f"layer {layer[1]}" if layer else name


def shown(numbers: list[int] | list[float]) -> str:
    few = ", ".join(f"{number:.4g}" for number in numbers[:4])
    return few if len(numbers) <= 4 else f"{numbers[0]:.4g} to {numbers[-1]:.4g}"
