"""The report of a comparison of speculation, from its results alone."""

from __future__ import annotations

import statistics

from dsc_serve.bench.compare.elements import Element, Heading, Items, Paragraph, Table, figure
from dsc_serve.bench.compare.results import Ratio
from dsc_serve.bench.compare.speculation.first_screen import first_screen
from dsc_serve.bench.compare.speculation.found import SpeculationResults

TITLE = "Several tokens a step: DSC, mixtures and dense models with the same drafts"
SUBJECT, BASELINE = "dsc", "moe"


def elements(results: SpeculationResults) -> list[Element]:
    """All but the title."""
    made = first_screen(results, SUBJECT, BASELINE)
    measured = [row.preset for row in results.widths] + [row.preset for row in results.drafted]
    for preset in dict.fromkeys(measured):
        made += [Heading(f"Preset {preset}"), Paragraph(sizes(results, preset))]
        made += [token_times(results, preset), gains(results, preset), against(results, preset)]
        made += [step_times_table(results, preset), distinct_table(results, preset)]
    if results.texts:
        made += [Heading("Real work"), Paragraph(told_of_texts(results)), texts_table(results)]
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.machine.items())
    return [*made, Heading("How it was measured"), Paragraph(method(results)), Items([results.client, machine])]


def method(results: SpeculationResults) -> str:
    a = results.asked
    return (
        f"Systems of random weights, in one process and in turn; prompts of {a.prompt_tokens} and outputs of "
        f"{a.tokens} tokens, drawn evenly and put in the place of what the greedy step draws, so that no output "
        "repeats itself. Drafts are made by a source that knows the output and errs at the given rate, whatever is "
        f"drafted with it; each system chooses how many of at most {a.max_drafts} it computes, from what its own steps "
        "took. Times are wall time for each output token of one stream, from when all streams have begun; medians of "
        "rounds, and ratios are medians of the rounds' own, with the lowest and the highest."
    )


def sizes(results: SpeculationResults, preset: str) -> str:
    known = results.parameters.get(preset, {})
    return "Parameters, and those that a token uses: " + ", ".join(
        f"{system} {total / 1e6:.0f} M, {active / 1e6:.0f} M" for system, (total, active) in known.items()
    )


def systems_of(results: SpeculationResults, preset: str) -> list[str]:
    return list(dict.fromkeys(row.system for row in results.drafted if row.preset == preset))


def streams_of(results: SpeculationResults, preset: str) -> list[int]:
    return sorted({row.streams for row in results.drafted if row.preset == preset})


def rates_of(results: SpeculationResults, preset: str) -> list[float]:
    return sorted({row.rate for row in results.drafted if row.preset == preset and row.rate is not None})


def spread(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def token_times(results: SpeculationResults, preset: str) -> Table:
    rates = [None, *rates_of(results, preset)]
    rows = [
        (
            system,
            f"{streams}",
            *(figure(results.median(preset, system, streams, rate, "ms")) for rate in rates),
            *(figure(results.median(preset, system, streams, rate, "drafts")) for rate in rates if rate is not None),
        )
        for streams in streams_of(results, preset)
        for system in systems_of(results, preset)
    ]
    head = ["system", "streams", "no drafts", *(f"right {rate:g}" for rate in rates if rate is not None)]
    head += [f"drafts a step, right {rate:g}" for rate in rates if rate is not None]
    return Table("Milliseconds for each output token of a stream", head, rows)


def gains(results: SpeculationResults, preset: str) -> Table:
    rates = rates_of(results, preset)
    rows = [
        (
            system,
            f"{streams}",
            *(spread(results.ratio(preset, streams, (system, rate), (system, None))) for rate in rates),
        )
        for streams in streams_of(results, preset)
        for system in systems_of(results, preset)
    ]
    head = ["system", "streams", *(f"right {rate:g}" for rate in rates)]
    return Table("Times as many tokens as without drafts", head, rows)


def against(results: SpeculationResults, preset: str) -> Table:
    rates = [None, *rates_of(results, preset)]
    rows = [
        (
            f"{SUBJECT} / {other}",
            f"{streams}",
            *(spread(results.ratio(preset, streams, (SUBJECT, rate), (other, rate))) for rate in rates),
        )
        for streams in streams_of(results, preset)
        for other in systems_of(results, preset)
        if other != SUBJECT and SUBJECT in systems_of(results, preset)
    ]
    head = ["", "streams", "no drafts", *(f"right {rate:g}" for rate in rates if rate is not None)]
    return Table("Times as many tokens as another system with equal drafts", head, rows)


def by_width(results: SpeculationResults, preset: str, title: str, name: str) -> Table:
    """A figure by streams, system and width."""
    found = {(row.streams, row.system, row.width): getattr(row, name) for row in results.widths if row.preset == preset}
    widths = sorted({width for _, _, width in found})
    rows = [
        (system, f"{streams}", *(figure(found.get((streams, system, width))) for width in widths))
        for streams, system in dict.fromkeys((streams, system) for streams, system, _ in found)
        if any(found.get((streams, system, width)) is not None for width in widths)
    ]
    return Table(title, ["system", "streams", *(f"{width + 1}" for width in widths)], rows)


def step_times_table(results: SpeculationResults, preset: str) -> Table:
    return by_width(results, preset, "Milliseconds of a step in which each stream computes so many tokens", "step_ms")


def distinct_table(results: SpeculationResults, preset: str) -> Table:
    return by_width(
        results, preset, "Distinct experts, adapters or atoms of a layer that such a step reads", "distinct"
    )


def told_of_texts(results: SpeculationResults) -> str:
    return (
        f"{results.text_model}, one stream, greedy; milliseconds for each token after the first, medians of "
        f"{len({row.round for row in results.texts})} rounds, without and with drafts in turn. The prediction is the "
        "answer itself with one word in twenty replaced."
    )


def texts_table(results: SpeculationResults) -> Table:
    rows = []
    for task in dict.fromkeys(row.task for row in results.texts):
        own = [row for row in results.texts if row.task == task]
        drafted: dict[str, int] = {}
        accepted: dict[str, int] = {}
        for row in own:
            for name, count in row.drafted.items():
                drafted[name] = drafted.get(name, 0) + count
                accepted[name] = accepted.get(name, 0) + row.accepted[name]
        rows.append(
            (
                task,
                f"{own[0].tokens}",
                figure(statistics.median(row.ms_without for row in own)),
                figure(statistics.median(row.ms_with for row in own)),
                spread(Ratio.of([row.gain for row in own])),
                ", ".join(f"{name} {accepted[name] / count:.0%} of {count}" for name, count in drafted.items() if count)
                or "none",
                "yes" if all(row.same for row in own) else "no",
            )
        )
    head = ("task", "tokens", "ms without", "ms with", "times as many tokens", "drafts that were right", "same answer")
    return Table("What drafts are worth, by task", head, rows)
