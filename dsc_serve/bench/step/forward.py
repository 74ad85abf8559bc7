"""The paper's measurement: the forward pass of a whole model over one batch of sequences, for each kind of FFN.

All models share the frame (embedding, attention over the paged cache, head) and differ in their FFNs: ours, and the
MoE and DSC layers as the reference script writes them, on the same weights.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, cast

import torch
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.native import RouterPrecision
from dsc_kernels.plan import Planner
from dsc_serve.bench.layer.frozen import ScriptDsc, ScriptMoe
from dsc_serve.bench.layer.measurement import with_threads
from dsc_serve.bench.machine import IDLE_LOAD, describe_machine, load_average
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.calibration import constants
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.model.initial import initial_tensors, preset_config
from dsc_serve.model.layer_groups import layer_groups

BLOCK = 16
WARM = 2
LIKE = 0.05  # relative distance of the last hidden states within which a layer computes the same, in bfloat16

SYSTEMS: dict[str, tuple[str, Any, RouterPrecision]] = {  # FFN kind, the frozen layer in place of ours, DSC's router
    "dense": ("dense", None, "auto"),
    "moe": ("moe", None, "auto"),
    "moe, loop": ("moe", ScriptMoe, "auto"),
    "dsc": ("dsc", None, "auto"),
    "dsc, exact router": ("dsc", None, "exact"),
    "dsc, script's layer": ("dsc", ScriptDsc, "auto"),
}


@dataclass(frozen=True)
class ForwardBench:
    """Forwards of several systems, all in turn."""

    preset: str = "paper"
    sequences: int = 16  # of the batch
    length: int = 256  # of each
    repeats: int = 50  # forwards of each system; times are means over them
    threads: int = 0
    seed: int = 0


@dataclass
class ForwardRow:
    """Milliseconds of a forward: mean, median, and the least. None where the result was wrong, which `wrong` says."""

    system: str
    mean_ms: float | None
    median_ms: float | None
    least_ms: float | None
    wrong: str = ""


@dataclass
class ForwardResult:
    bench: ForwardBench
    machine: dict[str, object]
    date: str
    rows: list[ForwardRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return {"command": command_of(self.bench), **asdict(self)}

    def mean(self, system: str) -> float | None:
        return next((row.mean_ms for row in self.rows if row.system == system), None)


class Replaced:
    """An FFN that adds the residual to what a frozen layer computes."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self._layer = layer

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: None = None) -> Tensor:
        out = self._layer(x)
        return out if residual is None else out + residual


def whole_batch(config: ModelConfig, bench: ForwardBench) -> StepBatch:
    """Every sequence as one chunk of random tokens, in blocks of its own."""
    count, length = bench.sequences, bench.length
    width = -(-length // BLOCK)
    generator = torch.Generator().manual_seed(bench.seed)
    ids = torch.randint(config.vocab_size, (count * length,), generator=generator)
    positions = torch.arange(length).repeat(count)
    groups = len(layer_groups(config).windows)
    tables = torch.arange(groups * count * width).reshape(groups, count, width)
    blocks = tables[:, :, torch.arange(length) // BLOCK].flatten(1)
    chunks = tuple(Chunk(row, row * length, length, length) for row in range(count))
    contexts = torch.full((count,), length)
    return StepBatch(ids, positions, blocks, positions % BLOCK, tables, contexts, 0, 1, chunks)


class Forward:
    """One system: a model, its cache, and the batch that it computes again and again."""

    def __init__(self, model: Decoder, batch: StepBatch) -> None:
        self.model, self._batch = model, batch
        self._kv_caches = model.kv_caches(int(batch.block_tables.numel()), BLOCK)

    def hidden(self) -> Tensor:
        return self.model.hidden(self._batch, self._kv_caches)

    def __call__(self) -> Tensor:
        """Logits [tokens, vocabulary] in the model's dtype, of every position, as in training and in the paper."""
        return self.model.head(self.model.norm(self.hidden()), out_dtype=self.model.dtype)


def build(
    kind: str, bench: ForwardBench, frozen: Any, tensors: Mapping[str, Tensor], router: RouterPrecision = "auto"
) -> Decoder:
    """A model of the kind, its FFNs replaced by frozen ones where these are given."""
    config, before = preset_config(bench.preset, kind), native.router_precision()
    native.use_router(router)
    try:
        model = Decoder(config, tensors, torch.bfloat16, torch.device("cpu"))
    finally:
        native.use_router(before)
    for ffn in dsc_layers(model):
        ffn.planner = Planner("auto", ffn.shape, constants(model.dtype))
    if frozen is not None:
        model.stack = None  # block by block, so that the replaced layers are asked
        for i, layer in enumerate(model.layers):
            prefix = f"model.layers.{i}.mlp."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            cast(Any, layer).ffn = Replaced(frozen(config, own))
    return model


def run_forward(bench: ForwardBench, report: Callable[[str], None] = lambda line: None) -> ForwardResult:
    """Measure all systems in turn; a replaced layer whose result differs from ours gets no time."""
    with with_threads(bench.threads):
        machine = {**describe_machine(), "threads": torch.get_num_threads(), "load_before": load_average()}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        result = ForwardResult(bench, machine | {"torch": str(torch.__version__), "kernels": ops.description()}, date)
        systems: dict[str, Forward] = {}
        wrong: dict[str, str] = {}
        for name, (kind, frozen, router) in SYSTEMS.items():
            report(f"{name}: building")
            config = preset_config(bench.preset, kind)
            tensors = dict(initial_tensors(config, bench.seed, torch.bfloat16))
            systems[name] = Forward(build(kind, bench, frozen, tensors, router), whole_batch(config, bench))
            if frozen is not None:
                ours, theirs = systems[kind].hidden().float(), systems[name].hidden().float()
                distance = float((ours - theirs).norm() / ours.norm())
                if not distance < LIKE:
                    wrong[name] = f"differs from ours by {distance:.3f}"
        times: dict[str, list[float]] = {name: [] for name in systems if name not in wrong}
        shuffled, rng = list(times), random.Random(bench.seed)
        for number in range(WARM + bench.repeats):
            rng.shuffle(shuffled)
            for name in shuffled:
                start = time.perf_counter()
                systems[name]()
                if number >= WARM:
                    times[name].append(1e3 * (time.perf_counter() - start))
            report(f"forward {number + 1} of {WARM + bench.repeats}")
        for name in systems:
            row = ForwardRow(name, None, None, None, wrong.get(name, ""))
            if name in times:
                own = times[name]
                row = ForwardRow(name, statistics.mean(own), statistics.median(own), min(own))
            result.rows.append(row)
    return result


def command_of(bench: ForwardBench) -> str:
    """The command that measures it."""
    options = {
        field.name: getattr(bench, field.name) for field in fields(bench) if getattr(bench, field.name) != field.default
    }
    return " ".join(["dsc-serve bench forward", *(f"--{name} {value}" for name, value in options.items())])


def format_forward(result: ForwardResult) -> str:
    """A table in Markdown, with ratios to our MoE."""
    moe = result.mean("moe")
    lines = ["| system | mean ms | median | least | to our MoE |", "|---|---|---|---|---|"]
    for row in result.rows:
        if row.mean_ms is None:
            lines.append(f"| {row.system} | {row.wrong} | | | |")
            continue
        ratio = "–" if moe is None else f"{row.mean_ms / moe:.2f}"
        lines.append(f"| {row.system} | {row.mean_ms:.0f} | {row.median_ms:.0f} | {row.least_ms:.0f} | {ratio} |")
    load = result.machine["load_before"]
    if isinstance(load, float) and load > IDLE_LOAD:
        lines += ["", f"Something else ran in the minute before it began (load average {load})."]
    return "\n".join(lines)
