"""Measures a machine: steps of the engine, by kind of FFN, size, form of weights, and what a step holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from dsc_kernels import native
from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.resuming import same_machine
from dsc_serve.bench.decide.measured_machine import MeasuredMachine, MeasuredStep, load_machine, save_machine
from dsc_serve.bench.decide.sizes import MEASURED_SIZES, DecideError, ModelFrame
from dsc_serve.bench.decide.step_terms import SYSTEMS, WEIGHTS, ServedForm, StepShape
from dsc_serve.bench.machine import describe_machine, load_average, widest_instructions
from dsc_serve.bench.step.least import screens_head, screens_router
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.machine import default_threads
from dsc_serve.model.checkpoint import choose_dtype, forms_for
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder, tensor_shapes
from dsc_serve.model.initial import GAMMA, STD
from dsc_serve.sampling_params import SamplingParams

CONTEXT = 32
STEPS = (
    *(StepShape(singles=singles, context=CONTEXT) for singles in (1, 2, 4, 8, 16, 32)),
    StepShape(singles=8, context=160),
    *(StepShape(chunk=tokens) for tokens in (4, 16, 96)),
    StepShape(singles=8, context=CONTEXT, chunk=64),
)
ROUNDS = 3
TIMED = 6  # steps of a round that decode
CHUNKS = 2  # steps of a round with a prompt
QUARTILE = 25  # of a shape's steps, whose time is taken: what else uses the machine makes steps longer, never shorter
WARM = 1  # steps of a round that do not count
CPU = torch.device("cpu")

Report = Callable[[str], None]


class AskedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    sizes: Mapping[str, ModelFrame] = msgspec.field(default_factory=lambda: dict(MEASURED_SIZES))
    systems: tuple[str, ...] = tuple(SYSTEMS)
    weights: tuple[str, ...] = WEIGHTS
    steps: tuple[StepShape, ...] = STEPS
    rounds: int = ROUNDS
    threads: int = 0  # 0: as many as the server would take
    minutes: float = 0.0  # nothing is begun after so many; 0: all is measured


def measure_machine(asked: AskedMachine, out: Path, report: Report = lambda line: None) -> tuple[MeasuredMachine, bool]:
    """Measure what `out` does not have yet, and write it there after each size and form; whether nothing is missing.

    Raises DecideError where what is there is of another machine or of other sizes.
    """
    threads, before = torch.get_num_threads(), native.router_precision()
    measured = begun(asked, out)
    torch.set_num_threads(int(measured.machine["threads"]))
    end = time.monotonic() + 60 * asked.minutes if asked.minutes else float("inf")
    try:
        for size, weights, systems in missing_models(asked, measured):
            if time.monotonic() > end:
                return measured, False
            report(f"{size}, {weights}: {', '.join(systems)}")
            measured.steps += measured_together(asked, size, weights, systems)
            measured.machine["load_after"] = load_average()
            save_machine(measured, out)
    finally:
        torch.set_num_threads(threads)
        native.use_router(before)
    return measured, True


def begun(asked: AskedMachine, out: Path) -> MeasuredMachine:
    """What `out` has, or nothing yet. Raises DecideError."""
    machine = describe_machine() | {
        "instructions": widest_instructions(),
        "threads": asked.threads or default_threads(),
        "load_before": load_average(),
    }
    sizes = dict(asked.sizes)
    if not out.is_file():
        return MeasuredMachine(date=datetime.now(UTC).isoformat(timespec="seconds"), machine=machine, sizes=sizes)
    kept = load_machine(out)
    try:
        same_machine(kept.machine, machine)
    except ComparisonError as error:
        raise DecideError(f"{out}: {error}; measure into another file") from None
    for name, frame in sizes.items():
        if kept.sizes.setdefault(name, frame) != frame:
            raise DecideError(f"{out} has size {name!r} as {kept.sizes[name]}, not as {frame}; measure into another")
    return kept


def missing_models(asked: AskedMachine, measured: MeasuredMachine) -> Iterator[tuple[str, str, list[str]]]:
    """Size, form, and the systems of which steps are missing; a DSC whose router is exact is one of stored weights."""
    kept = {(row.size, row.form.weights, row.system, row.step) for row in measured.steps}
    for size in asked.sizes:
        for weights in asked.weights:
            systems = [
                name
                for name in asked.systems
                if (weights == "stored" or SYSTEMS[name].router != "exact")
                and any((size, weights, name, step) not in kept for step in asked.steps)
            ]
            if systems:
                yield size, weights, systems


def measured_together(asked: AskedMachine, size: str, weights: str, systems: Sequence[str]) -> list[MeasuredStep]:
    """All systems of a size in memory, each step of one after the other, in rounds in which another is first."""
    engines = {name: StepEngine(asked, size, name, weights) for name in systems}
    found = []
    for step in asked.steps:
        times: dict[str, list[float]] = {name: [] for name in systems}
        for engine in engines.values():
            engine.prepare(step)
        for number in range(asked.rounds):
            for i in range(len(systems)):
                name = systems[(number + i) % len(systems)]
                times[name] += engines[name].times(step)
        for name, own in times.items():
            ms = round(float(np.percentile(own, QUARTILE)), 5)
            found.append(MeasuredStep(size=size, system=name, form=engines[name].form, step=step, ms=ms))
    for engine in engines.values():
        engine.close()
    return found


class StepEngine:
    """An engine around random weights of a size, whose steps hold what they are asked to."""

    def __init__(self, asked: AskedMachine, size: str, system: str, weights: str) -> None:
        frame, ffn, steps = asked.sizes[size], SYSTEMS[system], asked.steps
        native.use_router(ffn.router)  # type: ignore[arg-type]
        config, dtype = frame.config(ffn.ffn), choose_dtype("auto", torch.bfloat16, CPU)
        model = Decoder(config, random_tensors(config, dtype), dtype, CPU, forms_for(config, weights, ""))
        self.form = ServedForm(weights, dtype.itemsize, screens_router(model), screens_head(model))
        self._room = 8 + asked.rounds * (TIMED + WARM + CHUNKS)  # tokens that a request draws while a shape is measured
        running = 1 + max(step.singles for step in steps)
        tokens = max(step.singles * (int(step.context) + self._room) + step.chunk for step in steps)
        self.engine = Engine.for_model(
            model,
            EngineConfig(
                kv_tokens=tokens + 32 * running,
                max_running=running,
                step_tokens=max(step.chunk + running + step.singles * int(step.context) for step in steps),
                prefix_cache=False,
                itl_target_ms=60_000.0,
            ),
        )
        self._vocabulary, self._requests = config.vocab_size, 0

    def prepare(self, step: StepShape) -> None:
        """Bring as many requests as a shape has to where each step adds a token to each."""
        self._clear()
        for _ in range(step.singles):
            self._add(int(step.context), self._room)
        scheduler = self.engine.scheduler
        while scheduler.waiting or any(request.num_uncomputed > 1 for request in scheduler.running.values()):
            self._step()

    def times(self, step: StepShape) -> list[float]:
        """Milliseconds of a round's steps of the shape that was prepared."""
        if not step.chunk:
            return [self._step() for _ in range(WARM + TIMED)][WARM:]
        found = []
        for _ in range(WARM + CHUNKS):
            self._add(step.chunk, 1)
            found.append(self._step())
        return found[WARM:]

    def close(self) -> None:
        self._clear()
        self.engine.close()

    def _step(self) -> float:
        began = time.perf_counter()
        deltas = self.engine.step()
        ms = 1e3 * (time.perf_counter() - began)
        for delta in deltas:
            if delta.error:
                raise DecideError(f"a step failed: {delta.error}")
        return ms

    def _add(self, tokens: int, output: int) -> None:
        self._requests += 1
        prompt = [(self._requests * 7919 + 31 * j) % self._vocabulary for j in range(tokens)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        self.engine.add(str(self._requests), prompt, params)

    def _clear(self) -> None:
        for request_id in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.finish(request_id)


def random_tensors(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a fresh model, but with atoms as random as the rest: making them orthogonal takes minutes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensor = torch.empty(shape)
        if name.endswith("gamma"):
            tensor.fill_(GAMMA)
        elif name.endswith("bias"):
            tensor.zero_()
        elif len(shape) == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, STD, generator=generator)
        tensors[name] = tensor.to(dtype)
    return tensors
