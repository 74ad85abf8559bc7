"""Matrices of adapters in panels of 16 rows, as the native step reads them, in pieces of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_kernels.adapters import check_pairs
from dsc_kernels.memory import PAGE, mapped
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.screen import LANES
from dsc_kernels.native.tensors import is_bf16
from dsc_kernels.weights import LowRank, Module, Pair, Place

FIELDS = 8  # of an update in a table: down, up, scale, core, rank, inner rank, first panel, the panel behind its last
ALIGNMENT = 64
Modules = Sequence[Mapping[str, Module]]


def whole(size: int, unit: int = LANES) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True, eq=False)
class PanelForm:
    """How matrices of a dtype lie in panels of 16 rows."""

    dtype: torch.dtype

    @property
    def group(self) -> int:
        return 2 if is_bf16(self.dtype) else 1

    def numbers(self, n: int, d: int) -> int:
        return whole(n) * whole(d, self.group)

    def nbytes(self, n: int, d: int) -> int:
        return self.numbers(n, d) * self.dtype.itemsize

    def pack(self, weight: Tensor, piece: Tensor) -> Tensor:
        """A matrix [n, d] in a piece of memory, as [panels, size]."""
        n, d = weight.shape
        weight = weight.to(self.dtype).contiguous()
        out = piece.view(self.dtype)[: self.numbers(n, d)].view(whole(n) // LANES, -1)
        kernels.pack(is_bf16=is_bf16(self.dtype), w=weight.data_ptr(), n=n, d=d, out=out.data_ptr())
        return out


class Room:
    """One piece of memory, of which parts are taken one after the other."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.nbytes, self.at = sum(whole(size, ALIGNMENT) for size in sizes), 0
        if self.nbytes >= PAGE:
            self.memory = mapped(self.nbytes)[: self.nbytes]
        else:
            memory = torch.empty(self.nbytes + ALIGNMENT, dtype=torch.uint8)
            self.memory = memory[-memory.data_ptr() % ALIGNMENT :]

    def take(self, size: int) -> Tensor:
        self.at += whole(size, ALIGNMENT)
        return self.memory[self.at - whole(size, ALIGNMENT) : self.at]


@dataclass(frozen=True, slots=True, eq=False)
class PackedPair:
    """Matrices of a module in panels: down [inner, into], and up's rows where they stand in a product."""

    module: Module
    inner: int
    rank: int
    down: Tensor
    up: Tensor

    @property
    def first(self) -> int:
        return self.module.at // LANES

    @property
    def end(self) -> int:
        return whole(self.module.at + self.module.out) // LANES

    def unpacked(self) -> Pair:
        """Copies of the matrices."""
        skipped = self.module.at - self.first * LANES
        up = unpacked(self.up, self.rank)[skipped : skipped + self.module.out]
        return Pair(unpacked(self.down, self.module.into)[: self.inner].contiguous(), up.contiguous())


@dataclass(frozen=True, slots=True, eq=False)
class PackedUpdate:
    """An update on a pair. Of thousands of tenants each has hundreds: of its own it knows no more than where it is."""

    pair: PackedPair
    scales: Tensor  # memory in which its own begin, float32, padded with 0
    scale_at: int  # the byte where they do
    cores: Tensor | None = None  # the same of its cores, packed; None: it has none
    core_at: int = 0  # the byte where they begin

    @property
    def scale(self) -> Tensor:
        return self.scales[self.scale_at : self.scale_at + 4 * whole(self.pair.rank)].view(torch.float32)

    @property
    def core(self) -> Tensor | None:
        """[rank, inner], a copy."""
        if self.cores is None:
            return None
        pair, form = self.pair, PanelForm(self.pair.down.dtype)
        own = self.cores[self.core_at : self.core_at + form.nbytes(pair.rank, pair.inner)].view(form.dtype)
        return unpacked(own.view(whole(pair.rank) // LANES, -1), pair.inner)[: pair.rank].contiguous()

    @property
    def fields(self) -> tuple[int, ...]:
        pair = self.pair
        core = 0 if self.cores is None else self.cores.data_ptr() + self.core_at
        scale = self.scales.data_ptr() + self.scale_at
        return pair.down.data_ptr(), pair.up.data_ptr(), scale, core, pair.rank, pair.inner, pair.first, pair.end

    def unpacked(self) -> LowRank:
        """Copies of the matrices."""
        return LowRank(*self.pair.unpacked(), 1.0, self.scale[: self.pair.rank].clone(), self.core)


class NativeBasis:
    """Pairs of one dtype for decoders whose layers have these modules."""

    def __init__(self, pairs: Mapping[Place, PackedPair], modules: Modules, dtype: torch.dtype, nbytes: int) -> None:
        self.pairs, self.modules, self.dtype, self.nbytes = pairs, modules, dtype, nbytes


def basis(
    pairs: Mapping[Place, Pair],
    modules: Modules,
    dtype: torch.dtype,
    device: torch.device,
) -> NativeBasis:
    """Raises ValueError for a pair of no module, or of another shape."""
    check_pairs(pairs, modules)
    form = PanelForm(dtype)
    room = Room(size for (layer, name), pair in pairs.items() for size in pair_sizes(pair, modules[layer][name], form))
    packed = {
        (layer, name): packed_pair(pair, modules[layer][name], form, room) for (layer, name), pair in pairs.items()
    }
    return NativeBasis(packed, modules, dtype, room.nbytes)


def pair_sizes(pair: Pair, module: Module, form: PanelForm) -> tuple[int, int]:
    """Bytes of either matrix."""
    rows = whole(module.at + module.out) - module.at // LANES * LANES
    return form.nbytes(*pair.down.shape), form.nbytes(rows, pair.up.shape[1])


def packed_pair(pair: Pair, module: Module, form: PanelForm, room: Room) -> PackedPair:
    first, end = module.at // LANES * LANES, whole(module.at + module.out)
    up = torch.zeros(end - first, pair.up.shape[1], dtype=form.dtype)
    up[module.at - first : module.at - first + module.out] = pair.up
    down_size, up_size = pair_sizes(pair, module, form)
    down = form.pack(pair.down, room.take(down_size))
    return PackedPair(module, pair.down.shape[0], pair.up.shape[1], down, form.pack(up, room.take(up_size)))


def unpacked(panels: Tensor, width: int) -> Tensor:
    """The rows [panels · 16, width] of what was packed into [panels, size]."""
    group = 2 if is_bf16(panels.dtype) else 1
    return panels.view(len(panels), -1, LANES, group).transpose(1, 2).reshape(len(panels) * LANES, -1)[:, :width]
