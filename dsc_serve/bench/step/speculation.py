"""What drafts are worth: tokens per second with drafts that are right at given rates, against none, in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dsc_serve.bench.step.known_drafts import known_kinds
from dsc_serve.config import EngineConfig
from dsc_serve.engine.draft_time import DraftCost
from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.drafter import Drafter
from dsc_serve.engine.engine import Engine
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams


@dataclass(frozen=True)
class Task:
    """What is generated: continuations of random prompts, sampled with seeds, so that they do not repeat themselves."""

    streams: int
    prompt_tokens: int
    tokens: int
    temperature: float

    def prompts(self, vocabulary: int) -> list[list[int]]:
        rng = random.Random(self.streams)
        return [[rng.randrange(vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.streams)]

    def params(self, stream: int, answer: Sequence[int] = ()) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            seed=stream,
            max_tokens=self.tokens,
            ignore_eos=True,
            prediction_token_ids=tuple(answer),
        )


class Run(msgspec.Struct):
    """One system's run of a task."""

    tokens_per_s: float  # of all streams, from when all have begun
    step_ms: float  # median of these steps
    answers: list[list[int]]


class Row(msgspec.Struct):
    """What a system came to beside none."""

    name: str
    streams: int
    tokens_per_s: float  # median of rounds
    ratio: float  # to no drafts, median of the rounds' own
    lowest: float  # and the lowest and the highest of them
    highest: float
    drafted: float  # drafts for each token without them, on average
    accepted: float  # share of the drafts
    equal: float  # share of answers that are those without drafts: logits of several rows may round differently


class WidthRow(msgspec.Struct):
    """How long a step takes in which each stream has so many drafts."""

    streams: int
    width: int
    step_ms: float


def engine_for(model: Decoder, config: EngineConfig, task: Task, drafter: Drafter | None) -> Engine:
    """drafter: None: no drafts."""
    needed = task.streams * (task.prompt_tokens + task.tokens + 2 * config.block_size)
    running = max(task.streams, config.max_running)
    sized = msgspec.structs.replace(
        config,
        kv_tokens=needed,
        max_running=running,
        step_tokens=max(config.step_tokens, running),
        speculation="off" if drafter is None else "auto",
    )
    engine = Engine.for_model(model, sized)
    engine.drafter = drafter or engine.drafter
    return engine


def run(engine: Engine, task: Task, answers: Sequence[Sequence[int]] | None) -> Run:
    """answers: what the requests predict; None: nothing."""
    found: list[list[int]] = [[] for _ in range(task.streams)]
    for i, prompt in enumerate(task.prompts(engine.capacity.vocab_size)):
        engine.add(str(i), prompt, task.params(i, answers[i] if answers is not None else ()))
    counted, began, times = 0, 0.0, []
    while engine.has_work:
        started = time.perf_counter()
        deltas = engine.step()
        ended = time.perf_counter()
        for delta in deltas:
            if delta.error:
                raise RuntimeError(delta.error)
            found[int(delta.request_id)] += delta.token_ids
        if began:
            counted += sum(len(delta.token_ids) for delta in deltas)
            times.append(1e3 * (ended - started))
        elif all(found):
            began = ended
    return Run(counted / max(time.perf_counter() - began, 1e-9), statistics.median(times or [0.0]), found)


def compare(model: Decoder, config: EngineConfig, task: Task, rates: Sequence[float], rounds: int) -> list[Row]:
    """Drafts that are right at each of the rates, and n-grams, each beside none in every round."""
    vocabulary, most, budget = model.config.vocab_size, config.max_drafts, config.step_tokens
    without = engine_for(model, config, task, None)
    systems = {
        f"right {rate:g}": engine_for(model, config, task, Drafter(most, budget, (), known_kinds(rate, vocabulary)))
        for rate in rates
    }
    systems["ngram"] = engine_for(model, config, task, Drafter(most, budget, (), {"ngram": SOURCES["ngram"]}))
    answers = run(without, task, None).answers  # and warm
    for name, engine in systems.items():
        run(engine, task, None if name == "ngram" else answers)
    plain: list[Run] = []
    runs: dict[str, list[Run]] = {name: [] for name in systems}
    for _ in range(rounds):
        plain.append(run(without, task, None))
        for name, engine in systems.items():
            runs[name].append(run(engine, task, None if name == "ngram" else answers))
    rows = [
        Row("none", task.streams, statistics.median(one.tokens_per_s for one in plain), 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
    ]
    for name, own in runs.items():
        ratios = [one.tokens_per_s / base.tokens_per_s for one, base in zip(own, plain, strict=True)]
        report = systems[name].drafter.report
        drafted, accepted = sum(report.drafted.values()), sum(report.accepted.values())
        alike = [a == b for one in own for a, b in zip(one.answers, answers, strict=True)]
        steps = (rounds + 1) * task.streams * task.tokens - accepted
        rows.append(
            Row(
                name,
                task.streams,
                statistics.median(one.tokens_per_s for one in own),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                drafted / max(steps, 1),
                accepted / max(drafted, 1),
                sum(alike) / len(alike),
            )
        )
    return rows


def step_times(model: Decoder, config: EngineConfig, task: Task, most: int) -> list[WidthRow]:
    """How long steps take by width, with drafts that are all right."""
    answers = run(engine_for(model, config, task, None), task, None).answers
    rows = []
    for width in range(most + 1):

        def fixed(
            options: Sequence[tuple[float, int]],
            drawn: float,
            step_ms: float,
            cost: DraftCost,
            room: int,
            w: int = width,
        ) -> list[int]:
            return [min(w, most, room // len(options)) for _, most in options]

        drafter = Drafter(max(width, 1), config.step_tokens, (), known_kinds(1.0, model.config.vocab_size), fixed)
        engine = engine_for(model, config, task, drafter)
        engine.scheduler.step_time.drafts.cost = lambda single: DraftCost(0.0, 0.0)  # type: ignore[method-assign]
        rows.append(WidthRow(task.streams, width, run(engine, task, answers).step_ms))
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    lines = ["| streams | drafts | tokens/s | ratio | lowest, highest | drafts a step | right | same answers |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.streams} | {row.name} | {row.tokens_per_s:,.1f} | {row.ratio:.2f} | {row.lowest:.2f}, "
            f"{row.highest:.2f} | {row.drafted:.2f} | {row.accepted:.0%} | {row.equal:.0%} |"
        )
    return "\n".join(lines)


def format_widths(rows: Sequence[WidthRow]) -> str:
    lines = ["| streams | drafts for each | ms a step |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.streams} | {row.width} | {row.step_ms:.2f} |" for row in rows)])
