"""What `dsc-serve kernels calibrate` measured, kept between runs."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import msgspec
import torch

from dsc_kernels import ops
from dsc_kernels.calibrate import calibrate
from dsc_kernels.plan import DeviceConstants, Level
from dsc_serve.config import calibration_file


class CalibrationEntry(msgspec.Struct, frozen=True):
    """Constants as JSON holds them, which has no infinity: the last level's size is null."""

    gather: list[tuple[float | None, float]]
    stream: float
    flops: dict[str, float]
    order_token: float
    order_pick: float
    measured: str


def key(dtype: torch.dtype) -> str:
    """What constants hold for: the kernels, how many threads, and the dtype."""
    return f"{ops.description()}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}"


def stored() -> dict[str, CalibrationEntry]:
    """By key; nothing where the file is missing or unreadable: calibrating again replaces it."""
    try:
        return msgspec.json.decode(calibration_file().read_bytes(), type=dict[str, CalibrationEntry])
    except (OSError, msgspec.MsgspecError):
        return {}


def constants(dtype: torch.dtype) -> DeviceConstants:
    """Those measured for this dtype with the kernels and threads in use, or else the defaults."""
    entry = stored().get(key(dtype))
    if entry is None:
        return DeviceConstants()
    return DeviceConstants(
        gather=tuple(Level(math.inf if size is None else size, seconds) for size, seconds in entry.gather),
        stream=entry.stream,
        flops=entry.flops,
        order_token=entry.order_token,
        order_pick=entry.order_pick,
        source=f"measured {entry.measured}",
    )


def measure(dtype: torch.dtype) -> DeviceConstants:
    """Calibrate now, and keep the result beside those of other kernels, threads and dtypes."""
    date = datetime.now(UTC).date().isoformat()
    found = calibrate(dtype, f"measured {date}")
    entry = CalibrationEntry(
        gather=[(None if math.isinf(level.size) else level.size, level.seconds_per_byte) for level in found.gather],
        stream=found.stream,
        flops=found.flops,
        order_token=found.order_token,
        order_pick=found.order_pick,
        measured=date,
    )
    file = calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode({**stored(), key(dtype): entry})))
    new.replace(file)
    return found
