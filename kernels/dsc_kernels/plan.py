"""How a DSC layer's composition should read the bank, from its shape, the machine's rates and what routing has shown.

Everything here is arithmetic on numbers that the caller gives: no clock, no state of the machine. `calibrate` measures
the constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from dsc_kernels.grouping import TILE

Path = Literal["gather", "grouped"]
Mode = Literal["auto", "always", "off"]
MODES: tuple[Mode, ...] = ("auto", "always", "off")
GAIN = 0.05  # of the composition's time that grouping must promise: below it the estimate decides nothing


@dataclass(frozen=True)
class Level:
    """Reading bank rows while those in use amount to at most `size` bytes: seconds per byte, all threads together."""

    size: float
    seconds_per_byte: float


@dataclass(frozen=True)
class DeviceConstants:
    """What a machine does per second, with all its compute threads.

    The defaults are those of two server cores with AVX-512.
    """

    # Rising in size, the last of any size
    gather: tuple[Level, ...] = (
        Level(4 << 20, 3.2e-11),
        Level(45 << 20, 3.5e-11),
        Level(math.inf, 6.2e-11),
    )
    stream: float = 30e9  # bytes/s of weights read once
    # FLOP/s of large products by dtype
    flops: dict[str, float] = field(default_factory=lambda: {"bfloat16": 0.4e12, "float32": 0.2e12})
    order_token: float = 1.7e-8  # seconds to order a token
    order_pick: float = 6.4e-10  # and per pick of it
    source: str = "defaults"  # where the numbers are from

    def seconds_per_byte(self, size: float) -> float:
        """Of rows out of a working set of so many bytes."""
        return next(level.seconds_per_byte for level in self.gather if size <= level.size)


@dataclass(frozen=True)
class Shape:
    """A DSC layer."""

    atoms: int  # M
    k: int  # atoms per token K
    d: int  # width
    hidden: int  # units H of its static part
    dtype: torch.dtype  # that it computes in
    bank_row: int | None = None  # bytes of an atom's rows of both banks, where they are quantised
    router_row: int | None = None  # bytes of its row of the router, where that is quantised

    @property
    def row(self) -> int:
        """Bytes of an atom: its rows of both banks."""
        return 2 * self.d * self.dtype.itemsize if self.bank_row is None else self.bank_row

    @property
    def router_bytes(self) -> int:
        return self.atoms * (self.d * self.dtype.itemsize if self.router_row is None else self.router_row)

    @property
    def screen_bytes(self) -> int:
        """Of a router's rows in int8, by which a screened one is read."""
        return self.atoms * self.d


@dataclass(frozen=True)
class Sharing:
    """What routing is expected to do in a step: ρ of 16-token tiles as tokens arrive and in min-hash order (see
    `grouping.Tiles.sharing`), and the different atoms of the whole step per pick."""

    arrival: float = 1.0
    grouped: float = 1.0
    step: float = 1.0


@dataclass(frozen=True)
class PlannedOrder:
    """The path, the seconds that each would take for the composition, and why."""

    path: Path
    seconds: dict[Path, float]
    reason: str


def choose(batch: int, shape: Shape, constants: DeviceConstants, sharing: Sharing | None = None) -> PlannedOrder:
    """Gather rows as tokens arrive, or group tokens first? Without `sharing`, no two tokens are expected to share.

    A row's first use within a tile comes from wherever the step's rows fit; its further uses come from wherever those
    of two neighbours do. Grouping lowers the share of first uses, and costs the ordering.
    """
    sharing = sharing or Sharing()
    picks = batch * shape.k
    held = min(picks * sharing.step, shape.atoms) * shape.row
    far = constants.seconds_per_byte(held)
    near = constants.seconds_per_byte(min(held, 2 * shape.k * shape.row))

    def reading(first: float) -> float:
        return picks * shape.row * (first * far + (1 - first) * near)

    ordering = batch * constants.order_token + picks * constants.order_pick
    seconds: dict[Path, float] = {
        "gather": reading(sharing.arrival),
        "grouped": reading(sharing.grouped) + ordering,
    }
    if batch < 2:
        return PlannedOrder("gather", seconds, "one token shares with nobody")
    if far == near:
        reason = f"the step's {size(held)} of rows are as near as a neighbour's: only the ordering would be added"
        return PlannedOrder("gather", seconds, reason)
    if sharing.grouped >= sharing.arrival:
        return PlannedOrder("gather", seconds, f"ordering does not lower ρ ({sharing.arrival:.2f})")
    gain = 1 - seconds["grouped"] / seconds["gather"]
    told = f"ρ {sharing.arrival:.2f} → {sharing.grouped:.2f} over {size(held)} of rows"
    if gain < GAIN:
        return PlannedOrder("gather", seconds, f"{told} would save {gain:.1%} of the composition: less than {GAIN:.0%}")
    return PlannedOrder("grouped", seconds, f"{told} saves {gain:.0%} of the composition")


def product_seconds(batch: int, rows: int, d: int, dtype: torch.dtype, constants: DeviceConstants) -> float:
    """Of a product with weights [rows, d]: reading them once, or computing, whichever is longer."""
    flops = constants.flops.get(str(dtype).removeprefix("torch."), constants.flops["float32"])
    return max(rows * d * dtype.itemsize / constants.stream, 2 * batch * rows * d / flops)


def layer_seconds(
    batch: int, shape: Shape, constants: DeviceConstants, sharing: Sharing | None = None
) -> dict[str, float]:
    """A DSC layer's time by phase: router, static part, composition by the chosen path."""
    choice = choose(batch, shape, constants, sharing)
    return {
        "router": product_seconds(batch, shape.atoms, shape.d, shape.dtype, constants),
        "static": 2 * product_seconds(batch, shape.hidden, shape.d, shape.dtype, constants),
        "composition": choice.seconds[choice.path],
    }


class Planner:
    """One layer's decisions while serving: `choose` by the sharing seen so far, remembered per power of two of tokens.

    constants: None on a device that nobody has calibrated, where `auto` gathers. steps: how many have been decided;
    grouped_steps: of these, how many were grouped; tiles: their tiles of 16 tokens.
    """

    def __init__(self, mode: Mode, shape: Shape, constants: DeviceConstants | None) -> None:
        if mode not in MODES:
            raise ValueError(f"grouping {mode!r} is not known; allowed: {', '.join(MODES)}")
        self.mode, self.shape, self.constants = mode, shape, constants
        self.count_anew()
        self._sharing: Sharing | None = None
        self._choices: dict[int, PlannedOrder] = {}

    def count_anew(self) -> None:
        self.steps = self.grouped_steps = self.tiles = 0

    @property
    def sharing(self) -> Sharing | None:
        return self._sharing

    @sharing.setter
    def sharing(self, seen: Sharing) -> None:
        self._sharing = seen
        self._choices.clear()

    def choice(self, batch: int) -> PlannedOrder:
        """What `auto` does with about so many tokens."""
        if self.constants is None:
            return PlannedOrder("gather", {}, "this device has not been calibrated")
        bucket = batch.bit_length()
        if bucket not in self._choices:
            self._choices[bucket] = choose(1 << (bucket - 1), self.shape, self.constants, self._sharing)
        return self._choices[bucket]

    def grouped(self, batch: int) -> bool:
        """Whether to group a step of so many tokens; counts it, and its tiles if so."""
        self.steps += 1
        if self.mode == "off" or batch < 2 or (self.mode == "auto" and self.choice(batch).path == "gather"):
            return False
        self.grouped_steps += 1
        self.tiles += -(-batch // TILE)
        return True


def size(bytes_: float) -> str:
    for unit in ("B", "KB", "MB"):
        if bytes_ < 1000:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.1f} GB"
