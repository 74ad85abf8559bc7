"""The answer as tables and a chart, every figure of it marked as a model's."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from dsc_serve.bench.compare.elements import (
    Chart,
    Element,
    Heading,
    Items,
    MeasuredPage,
    Paragraph,
    Table,
    figure,
    markdown_of,
)
from dsc_serve.bench.compare.findings import counted
from dsc_serve.bench.decide.answers import ClosedLoad, ExpectedFigures, best
from dsc_serve.bench.decide.checked import CheckedFigure
from dsc_serve.bench.decide.cost_law import FitError
from dsc_serve.bench.decide.measured_machine import MeasuredMachine
from dsc_serve.bench.decide.sizes import ModelFrame
from dsc_serve.bench.machine import IDLE_LOAD
from dsc_serve.bench.plot import Point, line_chart

BASELINE = "moe"
NAME = "decide"  # of its place in a document, and of its chart
TITLE, COMMAND = "What to serve at a size that nobody measured", "dsc-serve bench decide"
MARK = "≈"  # before every figure that a model made
MODEL = "a model's figures, not measured"


class Decision(msgspec.Struct, kw_only=True):
    """All that the page tells."""

    frame: ModelFrame
    load: ClosedLoad
    measured: MeasuredMachine
    figures: list[ExpectedFigures]
    errors: dict[str, dict[str, FitError]]  # by form of weights and system
    held_out: dict[str, dict[str, FitError]]  # likewise
    checked: list[CheckedFigure]
    passed_over: list[str]

    def of(self, system: str, weights: str, speculation: bool) -> list[ExpectedFigures]:
        """By streams."""
        wanted = system, weights, speculation
        return [one for one in self.figures if (one.system, one.weights, one.speculation) == wanted]

    def label(self, weights: str) -> str:
        """A form of weights in words: stored ones by their dtype."""
        element = next(row.form.element for row in self.measured.steps)
        return weights if weights != "stored" else {2: "bfloat16", 4: "float32"}[element]


def measured_page(decision: Decision) -> MeasuredPage:
    """What stands between a document's marks, and its chart."""
    tables = markdown_of(elements(decision), f"plots/{NAME}", (NAME,))
    text = f"{title(decision)}.\n\n{tables}"
    return MeasuredPage(TITLE, COMMAND, text, {f"{NAME}-{NAME}.svg": chart(decision).svg})


def encoded(decision: Decision) -> bytes:
    """With the measured steps, so that the page can be made again."""
    return msgspec.json.format(msgspec.json.encode(decision), indent=1) + b"\n"


def load_decision(path: Path) -> Decision:
    """Raises OSError and DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=Decision)


def title(decision: Decision) -> str:
    frame = decision.frame
    return f"{frame.total / 1e6:,.0f} M parameters, {frame.active / 1e6:,.0f} M active: what to serve ({MODEL})"


def elements(decision: Decision) -> list[Element]:
    """The page but its title."""
    made: list[Element] = [Items(answers(decision)), chart(decision)]
    made += [Heading("Tokens per second"), Paragraph(told(decision))]
    for weights in decision.measured.weights():
        made += tables(decision, weights)
    made += [Heading("How far the model is off"), *error_tables(decision)]
    return [*made, Heading("Machine"), Items(circumstances(decision))]


def answers(decision: Decision) -> list[str]:
    """Three sentences: with what, how it compares with the baseline, and how sure that is."""
    drafts = f"with drafts right {decision.load.acceptance:g} of the time"
    most = {}
    for name, speculation in (("without speculation", False), (drafts, True)):
        own = [one for one in decision.figures if one.speculation == speculation]
        best_ones = [best(own, streams) for streams in decision.load.streams]
        most[name] = ", ".join(
            f"{said(decision, one)} at {one.streams} ({MARK}{figure(one.tokens_per_s)})" for one in best_ones
        )
    found = [f"The most tokens per second, by streams: {'; '.join(f'{name} {told}' for name, told in most.items())}."]
    pairs = {}
    for name, speculation in (("without speculation", False), (drafts, True)):
        ratios = ratios_to_baseline(decision, "dsc", "stored", speculation)
        pairs[name] = ", ".join(f"{MARK}{ratio:.2f} at {streams}" for streams, ratio in ratios.items())
    if all(pairs.values()):
        told_pairs = "; ".join(f"{name} {told}" for name, told in pairs.items())
        found.append(f"DSC / MoE in tokens per second, weights as stored, by streams: {told_pairs}.")
    worst = [error for own in decision.held_out.values() for error in own.values()]
    if worst:
        median = statistics.median(error.median for error in worst)
        found.append(
            f"These are {MODEL}: on sizes that the model was not fitted to it was off by {median:.0%} (median of "
            f"systems) and at most {max(error.largest for error in worst):.0%}; nearer ratios are no difference."
        )
    if decision.frame.total > decision.measured.largest.total:
        found.append(
            f"The largest model that was measured has {decision.measured.largest.total / 1e6:,.0f} M parameters: all "
            "here lies beyond."
        )
    return found


def said(decision: Decision, one: ExpectedFigures) -> str:
    drafts = f" with {counted(one.drafts, 'draft')} a step" if one.drafts else ""
    return f"{one.system} in {decision.label(one.weights)}{drafts}"


def ratios_to_baseline(decision: Decision, system: str, weights: str, speculation: bool) -> dict[int, float]:
    """Tokens per second to those of the baseline with the same weights and speculation, by streams."""
    base = {one.streams: one.tokens_per_s for one in decision.of(BASELINE, weights, speculation)}
    own = decision.of(system, weights, speculation)
    return {one.streams: one.tokens_per_s / base[one.streams] for one in own if one.streams in base}


def told(decision: Decision) -> str:
    load = decision.load
    return (
        f"Models of {decision.frame}. Closed loops of equal streams, prompts of {load.prompt_tokens} tokens, "
        f"{load.output_tokens} output tokens, greedy, steps of the engine alone: a server adds HTTP. Every figure "
        f"after {MARK} is a model's. With speculation, drafts are right with a chance of {load.acceptance:g} each and "
        "cost nothing but the wider step; as many are made as make a token cheapest, none where that is cheaper."
    )


def chart(decision: Decision) -> Chart:
    series: dict[str, list[Point]] = {}
    for weights in decision.measured.weights():
        for system in decision.measured.systems(weights):
            name = " ".join((system, decision.label(weights), *(["(baseline)"] if system == BASELINE else [])))
            series[name] = [(one.streams, one.tokens_per_s) for one in decision.of(system, weights, False)]
    note = f"{MODEL}; more is better; baseline: {BASELINE}; both axes logarithmic"
    heading = "Expected throughput without speculation (a model's)"
    return Chart(NAME, heading, line_chart(heading, "streams at once", "tokens per second, expected", series, note))


def tables(decision: Decision, weights: str) -> list[Element]:
    streams = [counted(one, "stream") for one in decision.load.streams]
    label, rows, ratios, times = decision.label(weights), [], [], []
    for system in decision.measured.systems(weights):
        for speculation in (False, True):
            own = decision.of(system, weights, speculation)
            name = f"{system}, speculation" if speculation else system
            drafts = [f" ({one.drafts})" if speculation else "" for one in own]
            rows.append([name, *(f"{MARK}{figure(one.tokens_per_s)}{n}" for one, n in zip(own, drafts, strict=True))])
            times.append(
                [name, *(", ".join(f"{MARK}{figure(ms)}" for ms in (one.token, one.first, one.end)) for one in own)]
            )
            to_base = ratios_to_baseline(decision, system, weights, speculation)
            ratios.append([name, *(f"{MARK}{ratio:.2f}" for ratio in to_base.values())])
    made: list[Element] = [
        Table(f"Tokens per second, {label} (drafts a step), a model's", ("system", *streams), rows),
        Table(
            f"Milliseconds between tokens, to the first token, of a whole request, {label}, a model's",
            ("system", *streams),
            times,
        ),
    ]
    if BASELINE in decision.measured.systems(weights):
        made.insert(1, Table(f"Tokens per second to {BASELINE}'s, {label}, a model's", ("system", *streams), ratios))
    return made


def error_tables(decision: Decision) -> list[Element]:
    rows = []
    for weights, own in decision.errors.items():
        for system, error in own.items():
            other = decision.held_out[weights].get(system)
            unseen = (f"{other.median:.1%}", f"{other.largest:.0%}") if other else ("one size only", "")
            fitted = (f"{error.median:.1%}", f"{error.largest:.0%}")
            rows.append((decision.label(weights), system, f"{error.count}", *fitted, *unseen))
    head = ("weights", "system", "kinds of steps", "fitted: median", "largest", "sizes left out: median", "largest")
    made: list[Element] = [Table("Expected to measured milliseconds of steps, error", head, rows)]
    if not decision.checked:
        made.append(Paragraph("No comparison's results were there to check it with."))
    else:
        made += checked_tables(decision)
    return [*made, Items(decision.passed_over)] if decision.passed_over else made


def checked_tables(decision: Decision) -> list[Element]:
    rows = []
    for one in decision.checked:
        own = f"{one.error:+.0%}" if one.same_machine else "another machine"
        ratio, measured = one.ratio_error, one.measured_ratio
        cells = (
            ("", "", "") if ratio is None else (f"{measured:.2f}", f"{MARK}{one.expected_ratio:.2f}", f"{ratio:+.0%}")
        )
        rates = f"{figure(one.measured)}", f"{MARK}{figure(one.expected)}"
        rows.append((one.source, one.system, f"{one.streams}", *rates, own, *cells))
    head = (
        *("comparison", "system", "streams", "measured tokens/s", "expected", "error"),
        *("measured ratio", "expected", "error"),
    )
    errors = [abs(one.error) for one in decision.checked if one.same_machine]
    ratios = [abs(error) for one in decision.checked if (error := one.ratio_error) is not None]
    parts = [
        f"{name}: median {statistics.median(own):.0%}, largest {max(own):.0%} of {len(own)}"
        for name, own in (("tokens per second on this kind of machine", errors), ("ratios to the baseline", ratios))
        if own
    ]
    summary = f"Errors beside comparisons of whole servers: {'; '.join(parts) or 'none that can be compared'}."
    return [Paragraph(summary), Table("Beside comparisons", head, rows)]


def circumstances(decision: Decision) -> list[str]:
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in decision.measured.machine.items())
    found = [f"Measured {decision.measured.date}", machine]
    load = decision.measured.machine.get("load_before")
    if load is not None and load > IDLE_LOAD:
        found.append(f"Something else used the machine before (load average {load:g}): measure again when it is idle.")
    return found
