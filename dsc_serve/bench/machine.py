"""The machine that measured."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

SECRET = "--api-key"  # and what follows it
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY")  # where set, they change figures
IDLE_LOAD = 0.5  # load average up to which a machine counts as idle


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def widest_instructions() -> str:
    """The best of the instruction sets that decide how fast bfloat16 is; empty where the system does not say."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Processes running or waiting to run, averaged over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def last_level_cache() -> int | None:
    """Bytes of the first core's largest cache; None where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii", errors="replace").strip()
        number, unit = text.rstrip("KMG"), text[-1:]
        if number.isdigit():
            sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}.get(unit, 0))
    return max(sizes, default=None)


def describe_machine() -> dict[str, object]:
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **openmp(),
    }


def openmp() -> dict[str, str]:
    """How threads are told to wait, where somebody has."""
    return {name: os.environ[name] for name in OPENMP if name in os.environ}


def dated_machine() -> dict[str, object]:
    """What measures, today, and how busy it was in the last minute."""
    return {**describe_machine(), "date": datetime.now(UTC).date().isoformat(), "load_average": load_average()}


def as_typed(kind: str) -> str:
    """The line that this process runs, `dsc-serve bench KIND …`, to run it again: without folders and keys."""
    words, secret = [], False
    for word in sys.argv[3:]:
        if not secret and not word.startswith(f"{SECRET}="):
            words.append(Path(word).name if word.startswith("/") else word)
        secret = word == SECRET
    return shlex.join(["dsc-serve", "bench", kind, *(word for word in words if word != SECRET)])
