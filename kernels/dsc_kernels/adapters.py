"""What adapters add to a step's tokens, in plain torch: the reference, and what serves where no kernel of ours does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from dsc_kernels.backend import Adapter, Linear
from dsc_kernels.weights import ATOMS, MODULES, NOT_TUNED, Adapted, LowRank, Module, Place, Tuning


class PlainAdapter:
    """Updates as plain tensors in a decoder's dtype on its device; a sum holds those of its parts."""

    def __init__(
        self, updates: Mapping[Place, Sequence[LowRank]], nbytes: int, tunings: Mapping[int, Tuning] = NOT_TUNED
    ) -> None:
        self._updates, self.nbytes, self.tunings = updates, nbytes, tunings

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        return self._updates.get((layer, module), ())

    @property
    def places(self) -> Sequence[Place]:
        return list(self._updates)


def adapter(
    updates: Mapping[Place, LowRank],
    modules: Sequence[Mapping[str, Module]],
    dtype: torch.dtype,
    device: torch.device,
    tunings: Mapping[int, Tuning] = NOT_TUNED,
) -> Adapter:
    """Raises ValueError for an update of no module, a tuning of no bank, or one of another shape."""
    check_updates(updates, modules)
    check_tunings(tunings, modules)
    ready = {}
    for place, update in updates.items():
        down, up = (part.to(device=device, dtype=dtype) for part in (update.down, update.up))
        ready[place] = [LowRank(down, up, 1.0, update.coefficients.to(device))]
    own = {layer: Tuning(one.bias.to(device), one.gamma.to(device)) for layer, one in tunings.items()}
    nbytes = sum(one.nbytes for (one,) in ready.values()) + sum(one.nbytes for one in own.values())
    return PlainAdapter(ready, nbytes, own)


def summed(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The same tensors with weights: nothing is copied."""
    joined: dict[Place, list[LowRank]] = {}
    for part, weight in parts:
        part = cast(PlainAdapter, part)
        for place in part.places:
            joined.setdefault(place, []).extend(replace(one, scale=one.scale * weight) for one in part.updates(*place))
    own, weight = tuned_part(parts)
    tunings = {layer: Tuning(one.bias, one.gamma * weight) for layer, one in own.items()}
    return PlainAdapter(joined, sum(one.gamma.nbytes for one in tunings.values()), tunings)


def tuned_part(parts: Sequence[tuple[Adapter, float]]) -> tuple[Mapping[int, Tuning], float]:
    """The tunings of the one part that has any, and its weight. Raises ValueError where there are two."""
    found = [(part.tunings, weight) for part, weight in parts if part.tunings]
    if len(found) > 1:
        raise ValueError(f"{len(found)} of the adapters are tenants of a bank; a sum may have one")
    return found[0] if found else (NOT_TUNED, 1.0)


def check_updates(updates: Mapping[Place, LowRank], modules: Sequence[Mapping[str, Module]]) -> None:
    """Raise ValueError for an update of no module, or of another shape."""
    for (layer, name), update in updates.items():
        module = modules[layer].get(name) if 0 <= layer < len(modules) and name in MODULES else None
        if module is None:
            raise ValueError(f"an adapter adds to {name!r} of layer {layer}, which is no module of this decoder")
        rank, shapes = update.rank, (tuple(update.down.shape), tuple(update.up.shape))
        if rank < 1 or shapes != ((rank, module.into), (module.out, rank)):
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
    for run, name in ((run, name) for run in adapted.runs for name in columns):
        rows = slice(run.first, run.first + run.length)
        for update in run.adapter.updates(adapted.layer, name):
            latents = x[rows].to(y.dtype) @ update.down.to(y.dtype).T * update.coefficients.to(y)
            y[rows, columns[name] : columns[name] + update.up.shape[0]] += latents @ update.up.to(y.dtype).T
    return y


def adapted_product(
    linear: Linear, x: Tensor, adapted: Adapted, columns: Mapping[str, int], residual: Tensor | None = None
) -> Tensor:
    """A linear layer's output with what adapters add, and the residual, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = add_updates(linear(x, out_dtype=wide), x, adapted, columns)
    return (y if residual is None else y + residual).to(x.dtype)
