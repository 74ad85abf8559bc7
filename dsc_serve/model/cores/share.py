"""What `adapter share` does: folders of LoRAs in, a basis and a folder of cores for each out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dsc_kernels.weights import Pair
from dsc_serve.files import CheckpointError
from dsc_serve.model.cores.files import BASIS, SHOWN, StoredBasis, basis_file, read_basis, write_basis, write_cores
from dsc_serve.model.cores.sharing import Moments, SharedAdapter, common_basis, projected
from dsc_serve.model.peft.inspection import Inspected, inspect_adapter


@dataclass(frozen=True)
class SharedSet:
    """Adapters on one basis."""

    digest: str  # the basis's
    pairs: Mapping[str, Pair]
    adapters: Mapping[str, SharedAdapter]
    alone: Mapping[str, int]  # bytes of the LoRAs that they were


def share(
    folders: Sequence[Path],
    out: Path,
    rank: int,
    max_error: float | None,
    measure: Callable[[], Moments] | None = None,
) -> SharedSet:
    """Find a basis of so many directions a module and write it with the adapters' cores to `out`.

    measure: second moments of inputs, by which the basis is whitened. Raises CheckpointError.
    """
    inspected = read_all(folders, out)
    moments = None if measure is None else measure()
    pairs = common_basis({name: own.modules for name, own in inspected.items()}, rank, moments)
    shared = on_basis(inspected, pairs, max_error, moments)
    base = next(iter(inspected.values())).claims.base
    digest = write_basis(made(out), pairs, "shared", base)
    return written(out, (digest, "shared", base), pairs, shared, inspected)


def project(folders: Sequence[Path], out: Path, onto: Path, max_error: float | None) -> SharedSet:
    """The same on a basis that there is, which is copied where `out` is another folder. Raises CheckpointError."""
    stored, inspected = named_basis(onto), read_all(folders, out)
    pairs = stored.read()
    shared = on_basis(inspected, pairs, max_error)
    if not (out / basis_file(stored.digest)).is_file():
        write_basis(made(out), pairs, stored.kind, stored.base)
    return written(out, (stored.digest, stored.kind, stored.base), pairs, shared, inspected)


def read_all(folders: Sequence[Path], out: Path) -> dict[str, Inspected]:
    """By the folders' names. Raises CheckpointError where two have one, or `out` has it."""
    found: dict[str, Inspected] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in found:
            raise CheckpointError(f"{folder}: another adapter is called {name!r}, too")
        if (out / name).exists():
            raise CheckpointError(f"{out / name}: exists already; nothing is written over it")
        try:
            found[name] = inspect_adapter(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {str(error).replace(f'{folder}/', '')}") from None
    bases = {own.claims.base for own in found.values()}
    if len(bases) > 1:
        raise CheckpointError(f"the adapters name different bases: {', '.join(sorted(map(repr, bases)))}")
    return found


def named_basis(path: Path) -> StoredBasis:
    """The basis that a path means: its file, or a folder of adapters that holds one. Raises CheckpointError."""
    if not path.is_dir():
        return read_basis(path)
    files = [file for file in sorted(path.iterdir()) if BASIS.fullmatch(file.name)]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{path}: holds {len(files)} bases ({names}); name one's file")
    return read_basis(files[0])


def on_basis(
    inspected: Mapping[str, Inspected],
    pairs: Mapping[str, Pair],
    max_error: float | None,
    moments: Moments | None = None,
) -> dict[str, SharedAdapter]:
    """Raises CheckpointError for an adapter no module of which is near enough to stand on the basis."""
    found = {}
    for name, own in inspected.items():
        shared = projected(own.modules, pairs, max_error, moments)
        if not shared.certificate:
            raise CheckpointError(f"adapter {name!r} is 0 everywhere; there is nothing to share")
        if not shared.cores:
            near = projected(own.modules, pairs, None, moments)
            shares = [near.certificate[module].share for module in near.cores]
            least = (
                f"at least {min(shares):.3g} of each update would be left out" if shares else "it has no such module"
            )
            allowed = "" if max_error is None else f", max-error is {max_error:g}"
            raise CheckpointError(f"adapter {name!r} cannot stand on this basis: {least}{allowed}; serve it as it is")
        found[name] = shared
    return found


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def written(
    out: Path,
    basis: tuple[str, str, str],
    pairs: Mapping[str, Pair],
    adapters: Mapping[str, SharedAdapter],
    inspected: Mapping[str, Inspected],
) -> SharedSet:
    for name, own in adapters.items():
        write_cores(out / name, basis, own.cores, own.own, own.certificate)
    return SharedSet(basis[0], pairs, adapters, {name: own.nbytes for name, own in inspected.items()})


def report(found: SharedSet) -> Iterator[str]:
    """Lines about the basis and each adapter on it."""
    ranks = sorted({rank for pair in found.pairs.values() for rank in (pair.down.shape[0], pair.up.shape[1])})
    nbytes = sum(part.nbytes for pair in found.pairs.values() for part in pair)
    spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    yield f"basis     {found.digest[:SHOWN]}: {len(found.pairs)} modules, rank {spread}, {nbytes:,} bytes, once for all"
    for name, own in found.adapters.items():
        shares = [one.share for module, one in own.certificate.items() if module in own.cores]
        kept = f", {len(own.own)} keep their own" if own.own else ""
        yield (
            f"{name}: {len(own.cores)} modules on it{kept}; {own.nbytes:,} bytes instead of {found.alone[name]:,}; "
            f"left out of an update's norm {median(shares):.2%} in the median, {max(shares):.2%} at most"
        )
