"""What drafts are worth: tokens per second with drafts that are right at given rates, against none, in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import msgspec

from dsc_serve.bench.step.known_drafts import known_kinds
from dsc_serve.bench.step.scripted import ScriptedRunner
from dsc_serve.bench.step.turns import in_turns
from dsc_serve.config import EngineConfig
from dsc_serve.engine.draft_time import DraftCost
from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.drafter import Choose, Drafter
from dsc_serve.engine.drafts.widths import Option
from dsc_serve.engine.engine import Engine
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams


@dataclass(frozen=True)
class Task:
    """What is generated: continuations of random prompts, sampled with seeds, so that they do not repeat themselves, or
    with a temperature of 0 scripts, which do not either.
    """

    streams: int
    prompt_tokens: int
    tokens: int
    temperature: float

    def prompts(self, vocabulary: int) -> list[list[int]]:
        rng = random.Random(self.streams)
        return [[rng.randrange(vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.streams)]

    def scripts(self, vocabulary: int) -> list[list[int]]:
        """An output for each stream, drawn evenly."""
        rng = random.Random(-self.streams)
        return [[rng.randrange(vocabulary) for _ in range(self.tokens)] for _ in range(self.streams)]

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

    tokens_per_s: float  # of all streams, from when all have begun, in a second of its own steps
    token_ms: float  # of its own steps for each output token of one stream, from then on, on average
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


def engine_for(
    model: Decoder,
    config: EngineConfig,
    task: Task,
    drafter: Drafter | None,
    scripts: Sequence[Sequence[int]] | None = None,
) -> Engine:
    """drafter: None: no drafts. scripts: what the streams are made to say; None: what the model does."""
    needed = task.streams * (task.prompt_tokens + task.tokens + 2 * config.block_size)
    running = max(task.streams, config.max_running)
    sized = msgspec.structs.replace(
        config,
        kv_tokens=needed,
        max_running=running,
        step_tokens=max(config.step_tokens, running),
        speculation="off" if drafter is None else "auto",
        step_ahead="auto" if scripts is None else "off",  # the scripted runner waits for each step
    )
    engine = Engine.for_model(model, sized)
    engine.drafter = drafter or engine.drafter
    if scripts is not None:
        engine.runner = ScriptedRunner(engine.runner, {str(i): script for i, script in enumerate(scripts)})
    return engine


def stepped(engine: Engine, task: Task, answers: Sequence[Sequence[int]] | None) -> Generator[float, bool | None, Run]:
    """A run whose steps are taken as they are asked for; yields the seconds of each, see `in_turns`.

    answers: what the requests predict; None: nothing.
    """
    found: list[list[int]] = [[] for _ in range(task.streams)]
    for i, prompt in enumerate(task.prompts(engine.capacity.vocab_size)):
        engine.add(str(i), prompt, task.params(i, answers[i] if answers is not None else ()))
    counted, begun, cold, own_s, times = 0, False, False, 0.0, []
    after: dict[str, list[float]] = {}  # tokens and seconds of each stream
    while engine.has_work:
        started = time.perf_counter()
        deltas = engine.step()
        taken = time.perf_counter() - started
        for delta in deltas:
            if delta.error:
                raise RuntimeError(delta.error)
            found[int(delta.request_id)] += delta.token_ids
        if begun and not cold:
            own_s += taken
            counted += sum(len(delta.token_ids) for delta in deltas)
            times.append(1e3 * taken)
            for delta in deltas:
                own = after.setdefault(delta.request_id, [0.0, 0.0])
                own[0], own[1] = own[0] + len(delta.token_ids), own_s
        begun = begun or all(found)
        cold = bool((yield taken))
    token_ms = statistics.fmean(1e3 * seconds / max(count, 1.0) for count, seconds in after.values() or [(1.0, 0.0)])
    return Run(counted / max(own_s, 1e-9), token_ms, statistics.median(times or [0.0]), found)


def run(engine: Engine, task: Task, answers: Sequence[Sequence[int]] | None) -> Run:
    """The same, all at once."""
    (found,) = in_turns([stepped(engine, task, answers)])
    return found


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
        drafting = [stepped(engine, task, None if name == "ngram" else answers) for name, engine in systems.items()]
        base, *others = in_turns([stepped(without, task, None), *drafting])
        plain.append(base)
        for own, one in zip(runs.values(), others, strict=True):
            own.append(one)
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


def fixed_width(width: int) -> Choose:
    """So many drafts for each, whatever they cost."""

    def choose(options: Sequence[Option], drawn: float, step_ms: float, cost: DraftCost, room: int) -> list[int]:
        return [min(width, option.most, room // len(options)) for option in options]

    return choose


def fixed_engine(
    model: Decoder, config: EngineConfig, task: Task, width: int, scripts: Sequence[Sequence[int]] | None
) -> Engine:
    """An engine whose steps have so many drafts for each stream, which are all right."""
    vocabulary, most = model.config.vocab_size, max(width, 1)
    drafter = Drafter(most, config.step_tokens, (), known_kinds(1.0, vocabulary), fixed_width(width))
    engine = engine_for(model, config, task, drafter, scripts)
    engine.scheduler.step_time.drafts.cost = lambda single: DraftCost(0.0, 0.0)  # type: ignore[method-assign]
    return engine


def step_times(
    model: Decoder, config: EngineConfig, task: Task, most: int, scripts: Sequence[Sequence[int]] | None = None
) -> list[WidthRow]:
    """How long steps take by width, with drafts that are all right."""
    answers = scripts or run(engine_for(model, config, task, None), task, None).answers
    engines = [fixed_engine(model, config, task, width, scripts) for width in range(most + 1)]
    found = in_turns([stepped(engine, task, answers) for engine in engines])
    return [WidthRow(task.streams, width, own.step_ms) for width, own in enumerate(found)]


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
