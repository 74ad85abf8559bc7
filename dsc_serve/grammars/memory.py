"""What processes take, as the system counts it, and how often to look."""

from __future__ import annotations

import os
import resource
from pathlib import Path

PAGE = resource.getpagesize()
FILLED_BYTES_S = 2 * 2**30  # that a core may fill
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.002, 0.05


def virtual_bytes() -> int:
    return pages("self")[0] * PAGE


def own_bytes(process: int | str = "self") -> int:
    """What a process holds of memory that is no file's, shared with its parent or not. Cheap."""
    _, resident, shared = pages(process)
    return (resident - shared) * PAGE


def private_bytes() -> int:
    """What this process holds that no other does; where the system does not tell, what it holds. Takes milliseconds."""
    try:
        with open("/proc/self/smaps_rollup") as lines:  # noqa: PTH123  this is read in the middle of a step
            return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
    except OSError:
        return own_bytes()


def grown_bytes(process: int, at_first: int) -> int:
    """What a process holds beyond what it had at first; 0 for one that is no more."""
    try:
        return max(0, own_bytes(process) - at_first)
    except (OSError, ValueError):
        return 0


def processor_s(process: int) -> float | None:
    """Seconds of the processor that a process's first thread has used; None where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_bytes().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def pages(process: int | str) -> tuple[int, int, int]:
    """Virtual, resident and shared."""
    virtual, resident, shared = Path(f"/proc/{process}/statm").read_bytes().split()[:3]
    return int(virtual), int(resident), int(shared)


def look_pause_s(room_bytes: int, spare_bytes: int) -> float:
    """Seconds in which all cores together fill no more than the room that is left, and half of what may be spare."""
    rate = FILLED_BYTES_S * (os.cpu_count() or 1)
    return min(LONGEST_LOOK_S, max(SHORTEST_LOOK_S, (max(0, room_bytes) + spare_bytes / 2) / rate))
