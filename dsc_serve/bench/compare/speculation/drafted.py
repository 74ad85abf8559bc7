"""Systems of random weights with the same drafts: tokens with and without them, and steps by their width."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

from dsc_serve.bench.compare.comparison import MIXTURES, ComparedSystem, Comparison, PresetName
from dsc_serve.bench.compare.runner import model_folder
from dsc_serve.bench.compare.speculation.asked import SpeculationComparison
from dsc_serve.bench.compare.speculation.distinct import distinct_rows
from dsc_serve.bench.compare.speculation.found import DraftedRow, SpeculationResults, StepWidthRow
from dsc_serve.bench.step.known_drafts import known_kinds
from dsc_serve.bench.step.speculation import Run, Task, engine_for, step_times, stepped
from dsc_serve.bench.step.turns import in_turns
from dsc_serve.config import EngineConfig
from dsc_serve.engine.drafts.drafter import Drafter
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.decoder import Decoder, parameter_counts

Report = Callable[[str], None]
Done = Callable[[], None]  # something has been added to the results


class SystemRuns:
    """One system with so many streams: an engine without drafts and one for each rate, which know what they cost."""

    def __init__(self, model: Decoder, config: EngineConfig, task: Task, rates: Sequence[float]) -> None:
        vocabulary = model.config.vocab_size
        self._task, self._scripts = task, task.scripts(vocabulary)
        self.engines: dict[float | None, Engine] = {None: engine_for(model, config, task, None, self._scripts)}
        for rate in rates:
            drafter = Drafter(config.max_drafts, config.step_tokens, (), known_kinds(rate, vocabulary))
            self.engines[rate] = engine_for(model, config, task, drafter, self._scripts)
        for each in self.engines:
            in_turns([self.stepped(each)])

    def stepped(self, rate: float | None) -> Generator[float, bool | None, Run]:
        return stepped(self.engines[rate], self._task, None if rate is None else self._scripts)


def measured(ready: Mapping[str, SystemRuns], task: Task, preset: str, number: int) -> list[DraftedRow]:
    """One round: the engines of all systems take turns."""
    rates = next(iter(ready.values())).engines
    places = [(system, rate) for rate in rates for system in ready]  # after another system's turn each
    reports = [ready[system].engines[rate].drafter.report for system, rate in places]
    before = [(sum(report.drafted.values()), sum(report.accepted.values())) for report in reports]
    found = in_turns([ready[system].stepped(rate) for system, rate in places])
    rows = []
    for (system, rate), one, report, then in zip(places, found, reports, before, strict=True):
        drafted, accepted = sum(report.drafted.values()) - then[0], sum(report.accepted.values()) - then[1]
        rows.append(
            DraftedRow(
                preset=preset,
                system=system,
                streams=task.streams,
                round=number,
                rate=rate,
                ms=one.token_ms,
                drafts=drafted / (task.streams * task.tokens - accepted),
                right=accepted / max(drafted, 1),
            )
        )
    return rows


class DraftedRun:
    """What is missing of a comparison's results, preset by preset."""

    def __init__(self, asked: SpeculationComparison, work: Path, results: SpeculationResults, report: Report) -> None:
        self.asked, self.work, self.results, self.report = asked, work, results, report

    def measure(self, done: Done) -> None:
        for preset in self.asked.presets:
            rounds, widths = list(self._rounds_left(preset)), list(self._widths_left(preset))
            if rounds or widths:
                self._measure(preset, rounds, widths, done)

    def _rounds_left(self, preset: str) -> Iterator[tuple[int, int, str]]:
        """Streams, rounds and systems; another system comes first in each round."""
        kept = {(row.preset, row.streams, row.round, row.system) for row in self.results.drafted}
        systems = self.asked.systems_at(preset)
        for streams in self.asked.streams:
            for number in range(self.asked.rounds):
                for i in range(len(systems)):
                    system = systems[(number + i) % len(systems)]
                    if (preset, streams, number, system) not in kept:
                        yield streams, number, system

    def _widths_left(self, preset: str) -> Iterator[tuple[int, str]]:
        kept = {(row.preset, row.streams, row.system) for row in self.results.widths}
        for streams in self.asked.streams:
            for system in self.asked.systems_at(preset):
                if (preset, streams, system) not in kept:
                    yield streams, system

    def _measure(
        self,
        preset: PresetName,
        rounds: Sequence[tuple[int, int, str]],
        widths: Sequence[tuple[int, str]],
        done: Done,
    ) -> None:
        systems = [s for s in self.asked.systems_at(preset) if any(s == left[-1] for left in (*rounds, *widths))]
        configs = {system: self._config(preset, system) for system in systems}
        models = {}
        for system in systems:
            self.report(f"{preset}, {system}: loading")
            models[system] = prepare_model(configs[system])
            self.results.parameters.setdefault(preset, {})[system] = parameter_counts(models[system].config)
        distinct = {}
        for system in dict.fromkeys(system for _, system in widths):
            self.report(f"{preset}, {system}: what its steps read")
            tasks = [self._task(streams) for streams, own in widths if own == system]
            distinct[system] = distinct_rows(models[system], configs[system], tasks, self.asked.max_drafts)
        for streams, system in widths:
            self.report(f"{preset}, {streams} streams, {system}: steps by width")
            task, model = self._task(streams), models[system]
            scripts = task.scripts(model.config.vocab_size)
            for row in step_times(model, configs[system], task, self.asked.max_drafts, scripts):
                self.results.widths.append(
                    StepWidthRow(
                        preset=preset,
                        system=system,
                        streams=streams,
                        width=row.width,
                        step_ms=row.step_ms,
                        distinct=distinct[system].get((streams, row.width)),
                    )
                )
            done()
        for streams, some in groupby(rounds, key=itemgetter(0)):
            ready: dict[str, SystemRuns] = {}
            for number, those in groupby(some, key=itemgetter(1)):
                own = [system for _, _, system in those]
                self.report(f"{preset}, {streams} streams, round {number + 1} of {self.asked.rounds}")
                for system in own:
                    if system not in ready:
                        ready[system] = SystemRuns(
                            models[system], configs[system], self._task(streams), self.asked.rates
                        )
                self.results.drafted += measured(
                    {system: ready[system] for system in own}, self._task(streams), preset, number
                )
                done()

    def _task(self, streams: int) -> Task:
        return Task(streams, self.asked.prompt_tokens, self.asked.tokens, 0.0)

    def _config(self, preset: PresetName, system: str) -> EngineConfig:
        """Of the system's model, which is made where it is not there yet."""
        a = self.asked
        equal: Literal["total"] | None = "total" if preset in MIXTURES and system == "dsc" else None
        compared = ComparedSystem(name=system, ffn=system, equal=equal)  # type: ignore[arg-type]
        comparison = Comparison(title="", subject=system, baseline=system, preset=preset, system=(compared,))
        folder = model_folder(compared, comparison, self.work)
        return EngineConfig(model=str(folder), threads=a.threads, dtype=a.dtype, max_drafts=a.max_drafts)
