"""Adapters as the native step reads them: packed once, in one piece of memory each, known by the address of a table."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dsc_kernels import backend
from dsc_kernels.adapters import bases_of, check_tunings, check_updates, tuned_part
from dsc_kernels.native.panels import (
    FIELDS,
    Modules,
    NativeBasis,
    PackedPair,
    PackedUpdate,
    PanelForm,
    Room,
    packed_pair,
    pair_sizes,
    whole,
)
from dsc_kernels.native.screen import SLACK, TINY, padded_bias
from dsc_kernels.weights import (
    MODULES,
    NOT_TUNED,
    Adapted,
    AdapterRun,
    Core,
    LowRank,
    MlpWeights,
    Module,
    Pair,
    Place,
    Tuning,
    Update,
)

Table = Mapping[Place, Sequence[PackedUpdate]]
NO_TUNING: Mapping[int, PackedTuning] = {}


class Numbers(NamedTuple):
    """So many float32 in a piece of memory, from byte `at`."""

    memory: Tensor
    at: int
    size: int

    @classmethod
    def packed(cls, values: Tensor, room: Room) -> Numbers:
        at = room.at
        room.take(4 * values.numel()).view(torch.float32)[: values.numel()].copy_(values)
        return cls(room.memory, at, values.numel())

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.at

    @property
    def tensor(self) -> Tensor:
        return self.memory[self.at : self.at + 4 * self.size].view(torch.float32)


class PackedTuning(NamedTuple):
    """A tuning as a layer reads it: the bias in whole panels, γ, and what bounds by this bias must allow for.

    All layers' lie in one piece of memory: tensors of their own would take half as much again as their numbers.
    """

    atoms: int
    bias: Numbers
    gamma: Numbers
    slack: Numbers

    @property
    def fields(self) -> tuple[int, ...]:
        return self.bias.address, self.gamma.address, self.slack.address

    def scaled(self, weight: float, room: Room) -> PackedTuning:
        """The same with γ times a weight."""
        return self._replace(gamma=Numbers.packed(self.gamma.tensor * weight, room))

    def unpacked(self) -> Tuning:
        return Tuning(self.bias.tensor[: self.atoms], self.gamma.tensor)


def tuning_sizes(tunings: Mapping[int, Tuning]) -> list[int]:
    """Bytes of the pieces that `packed_tunings` takes."""
    sizes = [size for own in tunings.values() for size in (4 * whole(own.bias.shape[0]), own.gamma.nbytes)]
    return [*sizes, 4 * len(tunings)] if tunings else []


def packed_tunings(tunings: Mapping[int, Tuning], room: Room) -> Mapping[int, PackedTuning]:
    if not tunings:
        return NO_TUNING
    found = {}
    slacks = torch.stack([own.bias.abs().max() * SLACK + TINY for own in tunings.values()])
    slack = Numbers.packed(slacks, room)
    for i, (layer, own) in enumerate(tunings.items()):
        bias = Numbers.packed(padded_bias(own.bias, own.bias.shape[0]), room)
        gamma = Numbers.packed(own.gamma, room)
        found[layer] = PackedTuning(own.bias.shape[0], bias, gamma, slack._replace(at=slack.at + 4 * i, size=1))
    return found


class NativeAdapter:
    """Updates of one dtype for decoders whose layers have these modules; a sum reads the memory of its parts."""

    def __init__(
        self,
        table: Table,
        modules: Modules,
        dtype: torch.dtype,
        nbytes: int,
        bases: Sequence[backend.Basis] = (),
        tuned: Mapping[int, PackedTuning] = NO_TUNING,
    ) -> None:
        self.table, self.modules, self.dtype, self.nbytes, self.bases = table, modules, dtype, nbytes, bases
        self.tuned = tuned
        self._tunings = array("q")
        for layer in range(len(modules) if tuned else 0):
            self._tunings.extend(tuned[layer].fields if layer in tuned else (0, 0, 0))
        self.tunings_address = self._tunings.buffer_info()[0] if tuned else 0
        self.parts = max((len(own) for own in table.values()), default=1)
        self._numbers = table_numbers(table, len(modules), self.parts) if table else no_numbers(len(modules))
        self.address = self._numbers.buffer_info()[0]

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        """Copies, made anew at each call."""
        return [own.unpacked() for own in self.table.get((layer, module), ())]

    @property
    def tunings(self) -> Mapping[int, Tuning]:
        return {layer: own.unpacked() for layer, own in self.tuned.items()}


def table_numbers(table: Table, layers: int, parts: int) -> array[int]:
    """What C++ reads of a table, which nothing changes any more."""
    nothing, numbers = (0,) * FIELDS, array("q")
    for place in product(range(layers), MODULES):
        own = table.get(place, ())
        for i in range(parts):
            numbers.extend(own[i].fields if i < len(own) else nothing)
    return numbers


@cache
def no_numbers(layers: int) -> array[int]:
    """Of a table without updates, which all who only have a bias and a scale share."""
    return table_numbers({}, layers, 1)


def adapter(
    updates: Mapping[Place, Update],
    modules: Modules,
    dtype: torch.dtype,
    device: torch.device,
    basis: backend.Basis | None = None,
    tunings: Mapping[int, Tuning] = NOT_TUNED,
) -> NativeAdapter:
    """Raises ValueError for an update of no module, a tuning of no bank, one of another shape, a core without basis."""
    check_tunings(tunings, modules)
    shared: Mapping[Place, PackedPair] = {}
    if basis is not None:
        if not isinstance(basis, NativeBasis) or basis.dtype != dtype or list(basis.modules) != list(modules):
            raise ValueError("a basis was made for another decoder")
        shared = basis.pairs
    check_updates(updates, modules, {place: (pair.rank, pair.inner) for place, pair in shared.items()})
    form = PanelForm(dtype)
    sizes: list[int] = []
    for (layer, name), update in updates.items():
        if isinstance(update, Core):
            sizes.append(form.nbytes(*update.matrix.shape))
        else:
            sizes.extend(pair_sizes(Pair(update.down, update.up), modules[layer][name], form))
        sizes.append(4 * whole(update.rank))
    sizes.extend(tuning_sizes(tunings))
    room, table = Room(sizes), dict[Place, Sequence[PackedUpdate]]()
    for (layer, name), update in updates.items():
        cores, core_at = None, room.at
        if isinstance(update, Core):
            pair, cores, scale = shared[layer, name], room.memory, torch.full((update.rank,), update.scale)
            form.pack(update.matrix, room.take(form.nbytes(*update.matrix.shape)))
        else:
            pair = packed_pair(Pair(update.down, update.up), modules[layer][name], form, room)
            scale = update.coefficients
        own = PackedUpdate(pair, room.memory, room.at, cores, core_at)
        room.take(4 * whole(update.rank)).view(torch.float32).zero_()[: update.rank].copy_(scale)
        table[layer, name] = [own]
    tuned = packed_tunings(tunings, room)
    return NativeAdapter(table, modules, dtype, room.nbytes, () if basis is None else (basis,), tuned)


def summed(parts: Sequence[tuple[backend.BoundAdapter, float]]) -> NativeAdapter:
    """The same matrices with weights: nothing but these is copied, and counted."""
    native = [(cast(NativeAdapter, part), weight) for part, weight in parts]
    every = [(place, one, weight) for part, weight in native for place, own in part.table.items() for one in own]
    tunings = [(layer, own, weight) for part, weight in native for layer, own in part.tuned.items()]
    sizes = [*(one.scale.nbytes for _, one, _ in every), *(4 * own.gamma.size for _, own, _ in tunings)]
    room, joined = Room(sizes), dict[Place, list[PackedUpdate]]()
    for place, one, weight in every:
        joined.setdefault(place, []).append(replace(one, scales=room.memory, scale_at=room.at))
        torch.mul(one.scale, weight, out=room.take(one.scale.nbytes).view(torch.float32))
    first = native[0][0]
    tuned_part(parts)  # raises where two are tenants
    tuned = {layer: own.scaled(weight, room) for layer, own, weight in tunings}
    bases = bases_of([part for part, _ in native])
    return NativeAdapter(joined, first.modules, first.dtype, room.nbytes, bases, tuned)


def checked(
    run: AdapterRun, modules: Sequence[Mapping[str, Module]] | None, dtype: torch.dtype, layers: int
) -> NativeAdapter:
    """A run's adapter. Raises ValueError where it was not made for such a decoder."""
    own = run.adapter
    if not isinstance(own, NativeAdapter) or own.dtype != dtype or len(own.modules) != layers:
        raise ValueError(f"an adapter was not made for a native decoder of {layers} layers in {dtype}")
    if modules is not None and own.modules is not modules and list(own.modules) != list(modules):
        raise ValueError("an adapter was made for a decoder of other shapes")
    return own


def mlp_shapes(mlp: MlpWeights) -> dict[str, tuple[int, int]]:
    """(out, into) of the modules of an MLP that every token takes."""
    hidden, d = mlp.up.shape
    names = ("up",) if mlp.gate is None else ("gate", "up")
    return {**dict.fromkeys(names, (hidden, d)), "down": (d, hidden)}


def addresses(adapters: Sequence[tuple[NativeAdapter, int, int]]) -> array[int]:
    """What C++ knows as AdapterRun, one after the other, of adapters with first tokens and counts."""
    numbers = ((own.address, own.tunings_address, own.parts, *tokens) for own, *tokens in adapters)
    return array("q", [n for run in numbers for n in run])


class LayerRuns(NamedTuple):
    """The runs of one layer's call, as that takes them, and what must outlive it."""

    runs: int = 0  # addresses
    run_count: int = 0
    run_of: int = 0
    layer_index: int = 0
    kept: tuple[object, ...] = ()


NO_RUNS = LayerRuns()


def layer_runs(
    adapted: Adapted | None, tokens: int, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> LayerRuns:
    """What adapters add in one layer; shapes: (out, into) of its modules. Raises ValueError for what does not fit."""
    if adapted is None or not adapted.runs:
        return NO_RUNS
    run_of, last, found = torch.full((tokens,), -1, dtype=torch.int32), 0, []
    for i, run in enumerate(adapted.runs):
        own = checked(run, None, dtype, len(run.adapter.modules) if isinstance(run.adapter, NativeAdapter) else 0)
        if not 0 <= adapted.layer < len(own.modules):
            raise ValueError(f"layer {adapted.layer} of an adapter for {len(own.modules)} layers")
        modules = own.modules[adapted.layer]
        other = {name: modules[name][:2] for name in shapes if name in modules}
        if other != dict(shapes):
            raise ValueError(f"an adapter was made for modules {other}; this layer has {dict(shapes)}")
        if run.first < last or run.length < 1 or run.first + run.length > tokens:
            raise ValueError(f"tokens {run.first} and {run.length} following do not fit into {tokens}, in order")
        last = run.first + run.length
        run_of[run.first : last] = i
        found.append((own, run.first, run.length))
    runs = addresses(found)
    return LayerRuns(runs.buffer_info()[0], len(found), run_of.data_ptr(), adapted.layer, (runs, run_of))
