"""Adapters as the native step reads them: packed once, in one piece of memory each, known by the address of a table."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dsc_kernels import backend
from dsc_kernels.adapters import check_tunings, check_updates, tuned_part
from dsc_kernels.memory import PAGE, mapped
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.screen import LANES, SLACK, TINY, padded_bias
from dsc_kernels.native.tensors import is_bf16
from dsc_kernels.weights import (
    MODULES,
    NOT_TUNED,
    Adapted,
    AdapterRun,
    LowRank,
    MlpWeights,
    Module,
    Place,
    Tuning,
)

FIELDS = 6  # of an update in a table: down, up, scale, rank, first panel, the panel behind its last
ALIGNMENT = 64
Table = Mapping[Place, Sequence["PackedUpdate"]]
NO_TUNING: Mapping[int, PackedTuning] = {}


def whole(size: int, unit: int = LANES) -> int:
    return -(-size // unit) * unit


class PackedUpdate:
    """An update in panels: down [rank, into], up's rows where they stand in a product, and scale, padded with 0."""

    def __init__(self, module: Module, rank: int, down: Tensor, up: Tensor, scale: Tensor) -> None:
        self.module, self.rank, self.down, self.up, self.scale = module, rank, down, up, scale
        self.first, self.end = module.at // LANES, whole(module.at + module.out) // LANES

    @property
    def fields(self) -> tuple[int, ...]:
        return self.down.data_ptr(), self.up.data_ptr(), self.scale.data_ptr(), self.rank, self.first, self.end

    def scaled(self, weight: float) -> PackedUpdate:
        """The same matrices with other weights."""
        return PackedUpdate(self.module, self.rank, self.down, self.up, self.scale * weight)

    def unpacked(self) -> LowRank:
        """Copies of the matrices."""
        down = unpacked(self.down, self.module.into)[: self.rank]
        skipped = self.module.at - self.first * LANES
        up = unpacked(self.up, self.rank)[skipped : skipped + self.module.out]
        return LowRank(down.contiguous(), up.contiguous(), 1.0, self.scale[: self.rank].clone())


class PackedTuning:
    """A tuning as a layer reads it: the bias in whole panels, γ, and what bounds by this bias must allow for."""

    def __init__(self, atoms: int, bias: Tensor, gamma: Tensor, slack: Tensor) -> None:
        self.atoms, self.bias, self.gamma, self.slack = atoms, bias, gamma, slack

    @classmethod
    def of(cls, own: Tuning) -> PackedTuning:
        atoms = own.bias.shape[0]
        slack = own.bias.abs().max() * SLACK + TINY
        return cls(atoms, padded_bias(own.bias, atoms), own.gamma.clone(), slack.reshape(1))

    @property
    def nbytes(self) -> int:
        return self.bias.nbytes + self.gamma.nbytes + self.slack.nbytes

    @property
    def fields(self) -> tuple[int, ...]:
        return self.bias.data_ptr(), self.gamma.data_ptr(), self.slack.data_ptr()

    def scaled(self, weight: float) -> PackedTuning:
        """The same with γ times a weight."""
        return PackedTuning(self.atoms, self.bias, self.gamma * weight, self.slack)

    def unpacked(self) -> Tuning:
        return Tuning(self.bias[: self.atoms], self.gamma)


class NativeAdapter:
    """Updates of one dtype for decoders whose layers have these modules; a sum reads the memory of its parts."""

    def __init__(
        self,
        table: Table,
        modules: Sequence[Mapping[str, Module]],
        dtype: torch.dtype,
        nbytes: int,
        tuned: Mapping[int, PackedTuning] = NO_TUNING,
    ) -> None:
        self.tuned = tuned
        self._tunings = array("q")
        for layer in range(len(modules) if tuned else 0):
            self._tunings.extend(tuned[layer].fields if layer in tuned else (0, 0, 0))
        self.tunings_address = self._tunings.buffer_info()[0] if tuned else 0
        self.table, self.modules, self.dtype, self.nbytes = table, modules, dtype, nbytes
        self.parts = max((len(own) for own in table.values()), default=1)
        nothing = (0,) * FIELDS
        numbers = array("q")
        for place in product(range(len(modules)), MODULES):
            own = table.get(place, ())
            for i in range(self.parts):
                numbers.extend(own[i].fields if i < len(own) else nothing)
        self._numbers = numbers  # never changed from here on
        self.address = numbers.buffer_info()[0]

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        """Copies, made anew at each call."""
        return [own.unpacked() for own in self.table.get((layer, module), ())]

    @property
    def tunings(self) -> Mapping[int, Tuning]:
        return {layer: own.unpacked() for layer, own in self.tuned.items()}


def adapter(
    updates: Mapping[Place, LowRank],
    modules: Sequence[Mapping[str, Module]],
    dtype: torch.dtype,
    device: torch.device,
    tunings: Mapping[int, Tuning] = NOT_TUNED,
) -> NativeAdapter:
    """Raises ValueError for an update of no module, a tuning of no bank, or one of another shape."""
    check_updates(updates, modules)
    check_tunings(tunings, modules)
    group = 2 if is_bf16(dtype) else 1
    sizes: list[tuple[int, int, int]] = []  # bytes of each part
    for (layer, name), update in updates.items():
        module, rank = modules[layer][name], update.rank
        rows = whole(module.at + module.out) - module.at // LANES * LANES
        down, up = whole(rank) * whole(module.into, group), rows * whole(rank, group)
        sizes.append((whole(down * dtype.itemsize, ALIGNMENT), whole(up * dtype.itemsize, ALIGNMENT), 4 * whole(rank)))
    size = sum(map(sum, sizes))
    memory = mapped(size)[:size] if size >= PAGE else torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % ALIGNMENT :]
    table, at = {}, 0
    for ((layer, name), update), parts in zip(updates.items(), sizes, strict=True):
        pieces = []
        for part in parts:
            pieces.append(memory[at : at + part])
            at += part
        table[layer, name] = [packed(update, modules[layer][name], dtype, pieces)]
    tuned = {layer: PackedTuning.of(own) for layer, own in tunings.items()}
    return NativeAdapter(table, modules, dtype, size + sum(own.nbytes for own in tuned.values()), tuned)


def packed(update: LowRank, module: Module, dtype: torch.dtype, pieces: Sequence[Tensor]) -> PackedUpdate:
    """An update in pieces of memory."""
    rank, group = update.rank, 2 if is_bf16(dtype) else 1
    first, end = module.at // LANES * LANES, whole(module.at + module.out)
    up = torch.zeros(end - first, rank, dtype=dtype)
    up[module.at - first : module.at - first + module.out] = update.up
    scale = pieces[2].view(torch.float32)
    scale.zero_()
    scale[:rank] = update.coefficients.cpu()
    placed: list[Tensor] = []
    for weight, piece in ((update.down.to(dtype).contiguous(), pieces[0]), (up, pieces[1])):
        n, d = weight.shape
        out = piece.view(dtype)[: whole(n) * whole(d, group)].view(whole(n) // LANES, -1)
        kernels.pack(is_bf16=is_bf16(dtype), w=weight.data_ptr(), n=n, d=d, out=out.data_ptr())
        placed.append(out)
    return PackedUpdate(module, rank, placed[0], placed[1], scale)


def unpacked(panels: Tensor, width: int) -> Tensor:
    """The rows [panels · 16, width] of what was packed into [panels, size]."""
    group = 2 if is_bf16(panels.dtype) else 1
    return panels.view(len(panels), -1, LANES, group).transpose(1, 2).reshape(len(panels) * LANES, -1)[:, :width]


def summed(parts: Sequence[tuple[backend.Adapter, float]]) -> NativeAdapter:
    """The same matrices with weights: nothing but these is copied, and counted."""
    joined: dict[Place, list[PackedUpdate]] = {}
    native = [(cast(NativeAdapter, part), weight) for part, weight in parts]
    for part, weight in native:
        for place, own in part.table.items():
            joined.setdefault(place, []).extend(one.scaled(weight) for one in own)
    first = native[0][0]
    own_bytes = sum(one.scale.nbytes for updates in joined.values() for one in updates)
    tuned_part(parts)  # raises where two are tenants
    tuned = {layer: own.scaled(weight) for part, weight in native for layer, own in part.tuned.items()}
    own_bytes += sum(own.gamma.nbytes for own in tuned.values())
    return NativeAdapter(joined, first.modules, first.dtype, own_bytes, tuned)


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
