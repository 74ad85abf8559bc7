"""What adapters add to a step's tokens, in plain torch: the reference, and what serves where no kernel of ours does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from dsc_kernels.backend import Basis, BoundAdapter, Linear
from dsc_kernels.weights import (
    ATOMS,
    MODULES,
    NOT_TUNED,
    Adapted,
    AdapterRun,
    Core,
    LowRank,
    Module,
    Pair,
    Place,
    Tuning,
    Update,
)

Run = tuple[AdapterRun, Sequence[LowRank]]  # with what its adapter adds to a module


class PlainBasis:
    """Pairs as plain tensors in a decoder's dtype on its device."""

    def __init__(self, pairs: Mapping[Place, Pair]) -> None:
        self.pairs, self.nbytes = pairs, sum(pair.down.nbytes + pair.up.nbytes for pair in pairs.values())


class PlainAdapter:
    """Updates as plain tensors in a decoder's dtype on its device; a sum holds those of its parts."""

    def __init__(
        self,
        updates: Mapping[Place, Sequence[LowRank]],
        nbytes: int,
        bases: Sequence[Basis] = (),
        tunings: Mapping[int, Tuning] = NOT_TUNED,
    ) -> None:
        self._updates, self.nbytes, self.bases, self.tunings = updates, nbytes, bases, tunings

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        return self._updates.get((layer, module), ())

    @property
    def places(self) -> Sequence[Place]:
        return list(self._updates)


def basis(
    pairs: Mapping[Place, Pair],
    modules: Sequence[Mapping[str, Module]],
    dtype: torch.dtype,
    device: torch.device,
) -> PlainBasis:
    """Raises ValueError for a pair of no module, or of another shape."""
    check_pairs(pairs, modules)
    return PlainBasis(
        {place: Pair(*(part.to(device=device, dtype=dtype) for part in pair)) for place, pair in pairs.items()}
    )


def adapter(
    updates: Mapping[Place, Update],
    modules: Sequence[Mapping[str, Module]],
    dtype: torch.dtype,
    device: torch.device,
    basis: Basis | None = None,
    tunings: Mapping[int, Tuning] = NOT_TUNED,
) -> BoundAdapter:
    """Raises ValueError for an update of no module, a tuning of no bank, one of another shape, a core without basis."""
    check_tunings(tunings, modules)
    pairs = {} if basis is None else cast(PlainBasis, basis).pairs
    check_updates(updates, modules, {place: (up.shape[1], down.shape[0]) for place, (down, up) in pairs.items()})
    ready, nbytes = {}, 0
    for place, update in updates.items():
        if isinstance(update, Core):
            core = update.matrix.to(device=device, dtype=dtype)
            ready[place] = [LowRank(*pairs[place], update.scale, core=core)]
            nbytes += core.nbytes
            continue
        down, up = (part.to(device=device, dtype=dtype) for part in (update.down, update.up))
        ready[place] = [LowRank(down, up, 1.0, update.coefficients.to(device))]
        nbytes += ready[place][0].nbytes
    own = {layer: Tuning(one.bias.to(device), one.gamma.to(device)) for layer, one in tunings.items()}
    nbytes += sum(one.nbytes for one in own.values())
    return PlainAdapter(ready, nbytes, () if basis is None else (basis,), own)


def summed(parts: Sequence[tuple[BoundAdapter, float]]) -> BoundAdapter:
    """The same tensors with weights: nothing is copied."""
    joined: dict[Place, list[LowRank]] = {}
    for part, weight in parts:
        part = cast(PlainAdapter, part)
        for place in part.places:
            joined.setdefault(place, []).extend(replace(one, scale=one.scale * weight) for one in part.updates(*place))
    own, weight = tuned_part(parts)
    tunings = {layer: Tuning(one.bias, one.gamma * weight) for layer, one in own.items()}
    nbytes = sum(one.gamma.nbytes for one in tunings.values())
    return PlainAdapter(joined, nbytes, bases_of([part for part, _ in parts]), tunings)


def tuned_part(parts: Sequence[tuple[BoundAdapter, float]]) -> tuple[Mapping[int, Tuning], float]:
    """The tunings of the one part that has any, and its weight. Raises ValueError where there are two."""
    found = [(part.tunings, weight) for part, weight in parts if part.tunings]
    if len(found) > 1:
        raise ValueError(f"{len(found)} of the adapters are tenants of a bank; a sum may have one")
    return found[0] if found else (NOT_TUNED, 1.0)


def bases_of(adapters: Sequence[BoundAdapter]) -> Sequence[Basis]:
    """What they share, each once."""
    return list({id(basis): basis for adapter in adapters for basis in adapter.bases}.values())


def module_at(place: Place, modules: Sequence[Mapping[str, Module]]) -> Module:
    """Raises ValueError where there is none."""
    layer, name = place
    module = modules[layer].get(name) if 0 <= layer < len(modules) and name in MODULES else None
    if module is None:
        raise ValueError(f"an adapter adds to {name!r} of layer {layer}, which is no module of this decoder")
    return module


def check_pairs(pairs: Mapping[Place, Pair], modules: Sequence[Mapping[str, Module]]) -> None:
    """Raise ValueError for a pair of no module, or of another shape."""
    for place, (down, up) in pairs.items():
        module, shapes = module_at(place, modules), (tuple(down.shape), tuple(up.shape))
        inner, rank = down.shape[0], up.shape[1]
        if min(inner, rank) < 1 or shapes != ((inner, module.into), (module.out, rank)):
            expected = f"[k, {module.into}] and [{module.out}, r]"
            raise ValueError(f"a basis's pair of {place[1]!r} in layer {place[0]} has {shapes}; expected {expected}")


def check_updates(
    updates: Mapping[Place, Update],
    modules: Sequence[Mapping[str, Module]],
    pairs: Mapping[Place, tuple[int, int]],
) -> None:
    """Raise ValueError for an update of no module, or of another shape. pairs: rank and inner rank of a basis's."""
    for place, update in updates.items():
        (layer, name), module = place, module_at(place, modules)
        if isinstance(update, Core):
            shape, wanted = tuple(update.matrix.shape), pairs.get(place)
            if shape != wanted:
                there = "there is no basis of it" if wanted is None else f"the basis there takes {list(wanted)}"
                raise ValueError(f"an adapter's core of {name!r} in layer {layer} is {list(shape)}; {there}")
            continue
        rank, shapes = update.rank, (tuple(update.down.shape), tuple(update.up.shape))
        if rank < 1 or shapes != ((rank, module.into), (module.out, rank)) or update.core is not None:
            expected = f"[r, {module.into}] and [{module.out}, r]"
            raise ValueError(f"an adapter's update of {name!r} in layer {layer} has {shapes}; expected {expected}")
        middle = update.middle
        if middle is not None and middle.shape != (rank,):
            raise ValueError(f"an update of rank {rank} has a middle of {list(middle.shape)}")


def check_tunings(tunings: Mapping[int, Tuning], modules: Sequence[Mapping[str, Module]]) -> None:
    """Raise ValueError for a tuning of a layer without a bank, or of another shape."""
    for layer, own in tunings.items():
        bank = modules[layer].get(ATOMS) if 0 <= layer < len(modules) else None
        if bank is None:
            raise ValueError(f"an adapter is a tenant of the bank of layer {layer}, which has none")
        shapes = tuple(own.bias.shape), tuple(own.gamma.shape)
        if shapes != ((bank.out,), (bank.into,)) or {own.bias.dtype, own.gamma.dtype} != {torch.float32}:
            raise ValueError(f"a tuning of layer {layer} has {shapes}; expected float32 [{bank.out}] and [{bank.into}]")


def add_updates(y: Tensor, x: Tensor, adapted: Adapted, columns: Mapping[str, int]) -> Tensor:
    """A product y float32 [T, n] of x [T, d] plus, in place, what adapters add to some of its columns.

    columns: the modules that the product consists of, each with its first column.
    """
    for name, column in columns.items():
        for group in neighbours(adapted, name):
            (first, updates), last = group[0], group[-1][0]
            rows = slice(first.first, last.first + last.length)
            for i, update in enumerate(updates):
                latents = x[rows].to(y.dtype) @ update.down.to(y.dtype).T
                parts = torch.split(latents, [run.length for run, _ in group])
                mixed = [mix(part, own[i]) for part, (_, own) in zip(parts, group, strict=True)]
                y[rows, column : column + update.up.shape[0]] += torch.cat(mixed) @ update.up.to(y.dtype).T
    return y


def neighbours(adapted: Adapted, module: str) -> Iterator[list[Run]]:
    """The runs in their order, those together that follow each other and share a basis."""
    group: list[Run] = []
    for run in adapted.runs:
        updates = run.adapter.updates(adapted.layer, module)
        if group and not (shares(group[-1][1], updates) and group[-1][0].first + group[-1][0].length == run.first):
            yield group
            group = []
        group.append((run, updates))
    if group:
        yield group


def shares(these: Sequence[LowRank], those: Sequence[LowRank]) -> bool:
    """Whether the same tokens' product would be taken of both."""
    return len(these) == len(those) and all(
        own.core is not None and other.core is not None and own.down is other.down and own.up is other.up
        for own, other in zip(these, those, strict=True)
    )


def mix(latents: Tensor, update: LowRank) -> Tensor:
    """Latents [T, inner] as `up` takes them, [T, rank]."""
    if update.core is not None:
        latents = latents @ update.core.to(latents.dtype).T
    return latents * update.coefficients.to(latents)


def adapted_product(
    linear: Linear, x: Tensor, adapted: Adapted, columns: Mapping[str, int], residual: Tensor | None = None
) -> Tensor:
    """A linear layer's output with what adapters add, and the residual, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = add_updates(linear(x, out_dtype=wide), x, adapted, columns)
    return (y if residual is None else y + residual).to(x.dtype)
