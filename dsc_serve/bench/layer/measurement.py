"""One FFN layer of every system, measured side by side: DSC, MoE, a mixture of LoRAs and a dense FFN.

Every repeat runs all systems in turn, in shuffled order, and the figure is the median over repeats: what disturbs the
machine for a while disturbs all of them. Each system rotates through layers of different weights whose touched bytes
exceed the last-level cache, so that none lives in a cache that others miss. A system whose output is wrong (`oracle`)
gets no time.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.bench.layer.oracle import Expected, Verdict, expected, verdict
from dsc_serve.bench.layer.roofline import Rates, RooflinePhase, phases, screened, stored_bytes
from dsc_serve.bench.layer.systems import (
    PATHS,
    PLAIN_MOE,
    SCREENED,
    LayerSystem,
    Weights,
    build_system,
    describe_sizes,
    kinds_of,
    layer_config,
    random_input,
    random_weights,
)
from dsc_serve.bench.layer.timing import GraphTimer, Timed, Timer, timer_for
from dsc_serve.bench.machine import IDLE_LOAD, describe_machine, last_level_cache, load_average, usable_cores
from dsc_serve.machine import available_memory
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.mixtures import MIXTURES

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
SAMPLE_SECONDS = 3e-3  # one sample of one system lasts at least this long, or one layer
RATE_SECONDS = 0.3
MIN_REPEATS = 3
MIN_LAYERS, MAX_LAYERS = 8, 64
COPIES = 5  # of a layer's weights: the bench's own, and those that native systems pack
FEWEST = 2  # layers of a mixture of many experts, each of which is as large as many others
CHECKED_TOKENS = 64  # compared with the oracle at least, over as many of the first 8 layers as that takes
IMPOSSIBLE_SHARE = 1.1  # of the overlapped roofline; beyond it, the ceilings were measured too low


class LayerBenchError(ValueError):
    """A benchmark that cannot be run as asked; one line that says what is allowed."""


@dataclass(frozen=True)
class LayerBench:
    """What to measure."""

    config: str = "paper"
    dtype: str = "bf16"
    threads: int = 0  # 0 for all cores
    batches: tuple[int, ...] = BATCHES
    repeats: int = 30
    layers: int | None = None  # rotated per system; None for 8 or as many as the last-level cache demands
    seconds: float = 20.0  # bound on the time of one batch size
    device: str = "cpu"
    seed: int = 0
    only: tuple[str, str] | None = None  # this kind and path alone

    def __post_init__(self) -> None:
        for name, value, least in (
            *(("batches", batch, 1) for batch in self.batches),
            *(("repeats", self.repeats, 1), ("threads", self.threads, 0), ("layers", self.layers or 1, 1)),
        ):
            if value < least:
                raise LayerBenchError(f"{name}: {value} is not allowed; it must be at least {least}")
        if not self.batches:
            raise LayerBenchError("batches is empty; give at least one batch size, such as 1,16")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise LayerBenchError("device is cuda, but torch finds no CUDA device on this machine; use --device cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True)
class LayerRow:
    """One system at one batch size."""

    system: str
    path: str
    batch: int
    dtype: str
    threads: int
    us: float | None  # None where the result was wrong
    ratio_to_best_moe: float | None  # us over that of the fastest MoE path
    ratio_to_plain_moe: float | None  # us over that of the frozen plain MoE
    roofline_share: float | None  # see `roofline`
    overlapped_share: float | None  # likewise
    bytes: int  # of the roofline, for one layer
    flops: int  # likewise
    error: float | None  # the largest relative error of a token's output; None where there is none
    compared: int  # how many tokens that is over
    wrong: str | None  # why us is None; None for a right result


Row = TypeVar("Row", bound=LayerRow)


@dataclass
class LayerResult(Generic[Row]):
    """Everything `--json` writes; notes are what a reader of the numbers must know."""

    machine: dict[str, object]
    command: str
    date: str
    notes: list[str] = field(default_factory=list)
    roofline: dict[str, object] = field(default_factory=dict)
    rows: Sequence[Row] = ()

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """One system at one batch size before the rates are known; seconds per layer, None where the result is wrong."""

    name: tuple[str, str]
    batch: int
    seconds: float | None
    checked: Verdict
    layer: list[RooflinePhase]
    rotated: int


def rotation_layers(touched: float, device: torch.device, least: int = MIN_LAYERS) -> int:
    """Layers to rotate so that what one token's pass touches of each fills the last-level cache twice."""
    return min(MAX_LAYERS, max(least, math.ceil(2 * last_level_cache_of(device) / touched)))


def layers_in_memory(configs: Iterable[ModelConfig], bench: LayerBench) -> int:
    """Layers of all kinds that half of the host's memory holds, with the copies that systems make of their weights."""
    one = sum(stored_bytes([random_weights(config, bench.seed, bench.torch_dtype)]) for config in configs)
    return max(1, available_memory() // (2 * COPIES * one))


def last_level_cache_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache() or 32 << 20


def interleaved_medians(
    systems: Sequence[LayerSystem],
    x: Tensor,
    repeats: int,
    seconds: float,
    timer: Timer,
    shuffle: Callable[[list[int]], None],
) -> list[float]:
    """Median seconds per layer of each system; stops before `repeats` when `seconds` are over, but not before 3."""

    def job(system: LayerSystem, calls: int) -> Timed:
        # A layer before wakes threads and fills the instruction cache; its weights are not used again soon
        return timer.prepared(lambda: system.run(x, calls), lambda: system.run(x, 1))

    stop = time.perf_counter() + seconds
    calls = [math.ceil(SAMPLE_SECONDS / max(job(system, 2)() / 2, 1e-7)) for system in systems]
    jobs = [job(system, count) for system, count in zip(systems, calls, strict=True)]
    samples: list[list[float]] = [[] for _ in systems]
    for repeat in range(repeats):
        if repeat >= MIN_REPEATS and time.perf_counter() > stop:
            break
        order = list(range(len(systems)))
        shuffle(order)
        for i in order:
            samples[i].append(jobs[i]() / calls[i])
    return [statistics.median(s) for s in samples]


def check(system: LayerSystem, x: Tensor, wanted: Sequence[Expected], dtype: torch.dtype) -> Verdict:
    """The system's first layers on x against what is wanted of them; a system that raises is wrong too."""
    try:
        outputs = [layer(x) for layer in system.layers[: len(wanted)]]
    except (RuntimeError, ValueError) as error:
        return Verdict(float("inf"), 0, f"raised {type(error).__name__}: {error}")
    return verdict(outputs, wanted, dtype, system.logit_error)


def screens(system: LayerSystem, tokens: int) -> bool:
    """Whether a system's routers are screened in int8 with so many tokens."""
    first = system.layers[0]
    return system.path == SCREENED and isinstance(first, DscFfn) and first.layer.screens(tokens)


@dataclass
class Group:
    """The systems of one FFN kind, with the weights that its oracle needs."""

    config: ModelConfig
    systems: list[LayerSystem]
    weights: list[Weights]
    rotated: int

    def measure(
        self, x: Tensor, dtype: torch.dtype, injected: Sequence[LayerSystem] = ()
    ) -> list[tuple[LayerSystem, Verdict, list[RooflinePhase]]]:
        """Every system's verdict on x, and the phases of the layer with the picks that x makes."""
        checked = self.weights[: math.ceil(CHECKED_TOKENS / x.shape[0])]
        wanted = [expected(self.config, weights, x) for weights in checked]
        distinct = statistics.fmean(want.distinct for want in wanted)
        layer = phases(self.config, x.shape[0], distinct, dtype.itemsize)
        least = {True: screened(layer, dtype.itemsize, x.device), False: layer} if self.config.ffn.kind == "dsc" else {}
        return [
            (system, check(system, x, wanted, dtype), least.get(screens(system, x.shape[0]), layer))
            for system in (*self.systems, *injected)
        ]


def build_groups(bench: LayerBench, notes: list[str]) -> list[Group]:
    """All systems of the benchmark; notes gains what is missing and what a reader must know."""
    dtype, device = bench.torch_dtype, bench.torch_device
    wanted = [name for name in PATHS if bench.only in (None, name)]
    kinds = [kind for kind in kinds_of(bench.config) if kind in dict(wanted)]
    configs = {kind: layer_config(bench.config, kind) for kind in kinds}
    touched = min(sum(p.bytes for p in phases(c, 1, picks_of_one(c), dtype.itemsize)) for c in configs.values())
    least = FEWEST if bench.config in MIXTURES else MIN_LAYERS
    layers = bench.layers or min(rotation_layers(touched, device, least), layers_in_memory(configs.values(), bench))
    if layers * touched < last_level_cache_of(device):
        notes.append(f"{layers} layers of a system can fit the last-level cache: small batches look faster than served")
    groups = []
    for index, (kind, config) in enumerate(configs.items()):
        weights = [random_weights(config, bench.seed + 1000 * index + i, dtype) for i in range(layers)]
        rotated = stored_bytes(weights)
        notes.append(f"{kind}: {describe_sizes(config)}; {layers} layers in rotation, {rotated / 1e6:.0f} MB")
        group = Group(config, [], weights[:MIN_LAYERS], rotated)
        for path in (path for k, path in wanted if k == kind):
            system = build_system(config, path, weights, dtype, device)
            if system is None:
                notes.append(f"{kind} {path}: not there on this machine ({ops.description()})")
            else:
                group.systems.append(system)
        groups.append(group)
    return groups


def picks_of_one(config: ModelConfig) -> int:
    """Atoms, adapters or experts that one token picks."""
    c = config.ffn
    names = {"dsc": "atoms_per_token", "moe": "experts_per_token", "molora": "adapters_per_token"}
    return int(getattr(c, names[c.kind])) if c.kind in names else 0


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """Compute with this many threads, 0 for all cores, and without autograd."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cores())
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def begin(command: str, device: torch.device) -> LayerResult[Any]:
    """The frame of a result: the machine, its load before, and a warning where it is busy."""
    load = load_average()
    machine = {
        **describe_machine(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "kernels": ops.description(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache_of(device),
        "load_before": load,
    }
    result = LayerResult[Any](machine, command, datetime.now(UTC).isoformat(timespec="seconds"))
    if load is not None and load > IDLE_LOAD:
        result.notes.append(f"WARNING: the machine was busy before the run (load average {load}); do not cite this")
    return result


def finish(result: LayerResult[Row], rates: Rates) -> None:
    """Record the load after and the measured rates."""
    load, threads = load_average(), torch.get_num_threads()
    result.machine["load_after"] = load
    if load is not None and load > threads + IDLE_LOAD:
        result.notes.append(f"WARNING: the machine was busy during the run (load average {load}, {threads} threads)")
    bandwidth = {str(size): rate for size, rate in sorted(rates.bandwidth.items())}
    result.roofline = {"gemm_flops_per_s": rates.gemm, "read_bytes_per_s": bandwidth}


def run_layer_bench(
    bench: LayerBench,
    command: str = "",
    report: Callable[[str], None] = lambda line: None,
    injected: dict[str, list[LayerSystem]] | None = None,
) -> LayerResult[LayerRow]:
    """Measure every system at every batch size; `report` hears of progress, `injected` adds systems by kind."""
    with with_threads(bench.threads):
        return _measure(bench, command, report, injected or {})


def _measure(
    bench: LayerBench, command: str, report: Callable[[str], None], injected: dict[str, list[LayerSystem]]
) -> LayerResult[LayerRow]:
    dtype, device = bench.torch_dtype, bench.torch_device
    result: LayerResult[LayerRow] = begin(command, device)
    report("building layers")
    groups = build_groups(bench, result.notes)
    result.notes.append("weights are random, so routing is uniform; inputs are normal, as a layer norm leaves them")
    rates, width, shuffle = Rates(), groups[0].config.hidden_size, random.Random(bench.seed).shuffle
    sizes = [group.rotated for group in groups]
    measured: list[Measured] = []
    timer = timer_for(device)
    if isinstance(timer, GraphTimer):
        x = random_input(1, width, bench.seed, dtype, device)
        result.notes += [note for group in groups for system in group.systems for note in waiting(system, x, timer)]
    for batch in bench.batches:
        report(f"batch {batch}")
        rates.measure(sizes, width, dtype, device, RATE_SECONDS)
        x = random_input(batch, width, bench.seed + batch, dtype, device)
        checked = [
            (group, *item)
            for group in groups
            for item in group.measure(x, dtype, injected.get(group.config.ffn.kind, ()))
        ]
        right = [system for _, system, seen, _ in checked if seen.wrong is None]
        medians = interleaved_medians(right, x, bench.repeats, bench.seconds, timer, shuffle)
        times = {system.name: median for system, median in zip(right, medians, strict=True)}
        measured += [
            Measured(system.name, batch, times.get(system.name), seen, layer, group.rotated)
            for group, system, seen, layer in checked
        ]
    rates.measure(sizes, width, dtype, device, RATE_SECONDS)
    result.rows = layer_rows(bench, measured, rates)
    if any((row.overlapped_share or 0) > IMPOSSIBLE_SHARE for row in result.rows):
        result.notes.append(
            "WARNING: systems beat the ceilings: those were measured on a busier machine; distrust shares"
        )
    finish(result, rates)
    return result


def waiting(system: LayerSystem, x: Tensor, timer: GraphTimer) -> list[str]:
    """What a reader must know of a system that cannot be captured."""
    if not timer.waits(lambda: system.run(x, 1)):
        return []
    return [f"{' '.join(system.name)} waits for the device: it is timed as it is launched, the others as graphs"]


def layer_rows(bench: LayerBench, measured: Sequence[Measured], rates: Rates) -> list[LayerRow]:
    """Ratios within each batch size, and shares of the roofline."""
    rows = []
    for item in measured:
        moe = {m.name: m.seconds for m in measured if m.batch == item.batch and m.name[0] == "moe" and m.seconds}
        added, overlapped = rates.seconds(item.layer, item.rotated)
        seconds = item.seconds
        rows.append(
            LayerRow(
                *item.name,
                item.batch,
                bench.dtype,
                torch.get_num_threads(),
                None if seconds is None else seconds * 1e6,
                quotient(seconds, min(moe.values(), default=None)),
                quotient(seconds, moe.get(PLAIN_MOE)),
                quotient(added, seconds),
                quotient(overlapped, seconds),
                round(sum(phase.bytes for phase in item.layer)),
                round(sum(phase.flops for phase in item.layer)),
                item.checked.error if math.isfinite(item.checked.error) else None,
                item.checked.compared,
                item.checked.wrong,
            )
        )
    return rows


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
