"""A law beside what comparisons of servers measured: results that lie in a folder, such as docs/results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.results import Results, load_results
from dsc_serve.bench.compare.speculation import found
from dsc_serve.bench.decide.answers import ClosedLoad, expect, tokens_a_step
from dsc_serve.bench.decide.cost_law import CostLaw
from dsc_serve.bench.decide.sizes import ModelFrame
from dsc_serve.bench.decide.step_terms import StepShape
from dsc_serve.model.initial import PRESETS

SUFFIX = ".results.json"
ROUTERS = {"exact": "dsc exact", "auto": "dsc", "int8-certified": "dsc"}
FORMS = {"auto": "stored", "stored": "stored", "bfloat16": "stored", "int8": "int8", "int4": "int4"}
UNDERSTOOD = {"router_precision", "weights"}


class CheckedFigure(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one system at a number of streams, measured and expected."""

    source: str
    system: str
    streams: int
    measured: float
    expected: float
    same_machine: bool  # whether both are of one kind of machine; else only ratios may be compared
    measured_ratio: float | None = None  # to the comparison's baseline, where that was measured and is of ours too
    expected_ratio: float | None = None  # likewise

    @property
    def error(self) -> float:
        return self.expected / self.measured - 1

    @property
    def ratio_error(self) -> float | None:
        if self.measured_ratio is None or self.expected_ratio is None:
            return None
        return self.expected_ratio / self.measured_ratio - 1


def is_decision(path: Path) -> bool:
    """Whether a file holds what `bench decide` answered."""
    try:
        return {"frame", "held_out"} <= msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw]).keys()
    except (OSError, msgspec.DecodeError):
        return False


def preset_frame(name: str) -> ModelFrame:
    budget = PRESETS[name].budget
    return ModelFrame(budget.total, budget.active, budget.layers, budget.width, budget.vocab_size, budget.context)


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one kind of machine."""
    return all(one.get(name) == other.get(name) for name in ("cpu", "instructions", "threads"))


def served_as(system: Mapping[str, Any]) -> tuple[str, str] | None:
    """The system and form of weights that a comparison's system is; None where the law knows no such one."""
    settings = system.get("settings") or {}
    if system.get("command") or system.get("folder") or not system.get("ffn") or settings.keys() - UNDERSTOOD:
        return None
    weights = FORMS.get(str(settings.get("weights", "auto")))
    name = str(system["ffn"])
    if name == "dsc":
        name = ROUTERS.get(str(settings.get("router_precision", "auto")), "")
    return (name, weights) if name and weights else None


def checked_figures(
    folder: Path, laws: Mapping[str, CostLaw], machine: Mapping[str, Any]
) -> tuple[list[CheckedFigure], list[str]]:
    """All that a folder's results can be compared with, and for each file that says nothing here, why.

    Raises nothing for files of other forms: they are named among the others.
    """
    figures, passed_over = list[CheckedFigure](), list[str]()
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        if is_decision(file):
            continue
        try:
            own = list(of_speculation(file, laws, machine) if found.is_kept_in(file) else of_loads(file, laws, machine))
        except ComparisonError:
            passed_over.append(f"{file.name}: not a comparison's results")
            continue
        figures += own
        if not own:
            passed_over.append(f"{file.name}: no system at a preset's sizes that was measured here too")
    return figures, passed_over


def of_loads(file: Path, laws: Mapping[str, CostLaw], machine: Mapping[str, Any]) -> Iterator[CheckedFigure]:
    """Raises ComparisonError."""
    results: Results = load_results(file)
    asked, source = results.comparison, file.name.removesuffix(SUFFIX)
    if asked.get("preset") not in PRESETS:
        return
    frame = preset_frame(asked["preset"])
    load = ClosedLoad(prompt_tokens=asked["prompt_tokens"], output_tokens=asked["output_tokens"])
    known = {system["name"]: at for system in asked["system"] if (at := served_as(system)) is not None}
    for streams in results.points("closed"):
        rates = {}
        for name, (system, weights) in known.items():
            measured = results.median(name, "closed", streams, "output_throughput")
            if measured and weights in laws and system in laws[weights].forms:
                expected = expect(laws[weights], system, weights, frame, load, int(streams), False).tokens_per_s
                rates[name] = measured, expected
        base = rates.get(asked["baseline"])
        for name, (measured, expected) in rates.items():
            compared = base is not None and name != asked["baseline"]
            yield CheckedFigure(
                source=source,
                system=name,
                streams=int(streams),
                measured=measured,
                expected=expected,
                same_machine=alike(results.machine, machine),
                measured_ratio=measured / base[0] if base and compared else None,
                expected_ratio=expected / base[1] if base and compared else None,
            )


def of_speculation(file: Path, laws: Mapping[str, CostLaw], machine: Mapping[str, Any]) -> Iterator[CheckedFigure]:
    """Drafts that are right at given rates, by the drafts of each step that there were. Raises ComparisonError."""
    results, source = found.load(file), file.name.removesuffix(SUFFIX)
    if "stored" not in laws:
        return
    law, context = laws["stored"], results.asked.prompt_tokens + results.asked.tokens / 2
    points = dict.fromkeys((row.preset, row.system, row.streams, row.rate) for row in results.drafted)
    for preset, system, streams, rate in points:
        ms = results.median(preset, system, streams, rate, "ms")
        drafts = results.median(preset, system, streams, rate, "drafts")
        if preset not in PRESETS or not ms or drafts is None or system not in law.forms:
            continue
        width = round(drafts)
        step = StepShape(singles=streams, context=context, drafts=width)
        expected = law.ms(system, preset_frame(preset), step) / tokens_a_step(rate or 0.0, width)
        said = "no drafts" if rate is None else f"drafts right {rate:g}"
        yield CheckedFigure(
            source=f"{source}, {preset}, {said}",
            system=system,
            streams=streams,
            measured=1e3 * streams / ms,
            expected=1e3 * streams / expected,
            same_machine=alike(results.machine, machine),
        )
