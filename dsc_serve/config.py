"""Typed settings of the engine and of the server; the only place that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

DTYPES = {"auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
EMBEDDED_MODEL = "dsc-tiny"


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the setting, its value and what is allowed."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine needs to know. Sizes are counts of tokens, sequences or blocks; 0 threads means: choose.

    kv_tokens: tokens the KV pool holds; 0 sizes it for `max_running` full contexts within a fifth of free memory.
    kernels: CPU kernels to use: "auto" (the best this machine has), "plain" (torch alone) or an instruction set's name.
    """

    model: str = EMBEDDED_MODEL
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 0
    max_running: int = 64
    step_tokens: int = 512
    block_size: int = 16
    kv_tokens: int = 0
    policy: str = "fcfs"
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; allowed: {', '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device {self.device!r} is not known; allowed: cpu, cuda")
        for field, low in (("threads", 0), ("max_running", 1), ("step_tokens", 1), ("block_size", 1), ("kv_tokens", 0)):
            value = getattr(self, field)
            if value < low:
                raise ConfigError(f"{field} is {value}; it must be at least {low}")
        if self.step_tokens < self.max_running:
            raise ConfigError(
                f"step_tokens is {self.step_tokens} but max_running is {self.max_running}; a step must have room for "
                "one token of every running request: raise step_tokens or lower max_running"
            )


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how the HTTP server listens. `max_waiting` requests may queue; beyond it clients get 429."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str = ""
    max_waiting: int = 1024
    start_timeout_s: float = 300.0
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; allowed: 0 to 65535 (0 picks a free one)")
        if self.max_waiting < 1:
            raise ConfigError(f"max_waiting is {self.max_waiting}; it must be at least 1")


def models_folder() -> Path:
    """The folder of the models that ship with the package."""
    return Path(__file__).parent / "models"


def resolve_model(name_or_path: str) -> Path:
    """The checkpoint folder for a path or for the name of an embedded model.

    Raises ConfigError when neither exists, naming the embedded models.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    embedded = models_folder() / name_or_path
    if "/" not in name_or_path and embedded.is_dir():
        return embedded
    names = sorted(p.name for p in models_folder().iterdir() if p.is_dir()) if models_folder().is_dir() else []
    raise ConfigError(
        f"model {name_or_path!r} is neither a folder nor an embedded model; embedded: {', '.join(names) or 'none'}"
    )


def engine_environment(threads: int) -> dict[str, str]:
    """Environment of an engine process with `threads` compute threads. Must be set before torch loads.

    OpenMP threads that spin at barriers for long slow down many times over when another process, such as the API
    server, wants their core; threads that sleep at once wake too slowly for layers of 100 µs. So they spin for some
    microseconds and then sleep; `docs/kernels.md` has the figures.
    """
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env.setdefault("GOMP_SPINCOUNT", "3000")
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


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
    limit, used = (read_text(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def read_text(path: str) -> str:
    """A small file of the system's, or nothing where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
