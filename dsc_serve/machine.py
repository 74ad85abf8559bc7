"""What this machine, or the container on it, has: processors and memory. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """Compute threads for this machine: every core this process may run on, within its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def available_memory() -> int:
    """Bytes that this process may still take, within its container's limit."""
    fields = dict(line.split(":", 1) for line in read_text("/proc/meminfo").splitlines())
    if "MemAvailable" in fields:
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used, statistics = (read_text(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current", "stat"))
    if limit.isdecimal() and used.isdecimal():
        counts = dict(line.split(" ", 1) for line in statistics.splitlines())
        held = int(used) - int(counts.get("inactive_file", 0))  # files that were read once, which give way
        available = min(available, max(0, int(limit) - max(0, held)))
    return available


def resident_bytes() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    pages = read_text("/proc/self/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def read_text(path: str) -> str:
    """A small file of the system's, or nothing where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
