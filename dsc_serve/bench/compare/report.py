"""The report of a comparison, from its results alone: elements that become an HTML page, or Markdown with SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsc_serve.bench.compare.comparison import LEAST_REQUESTS
from dsc_serve.bench.compare.elements import (
    Cells,
    Chart,
    Element,
    Heading,
    Items,
    Paragraph,
    Table,
    figure,
    markdown_of,
    page,
)
from dsc_serve.bench.compare.findings import (
    FIGURES,
    Check,
    answer,
    checks,
    counted,
    ratio_rows,
    sentences,
    verdict,
)
from dsc_serve.bench.compare.prompt_steps import PROMPT_STEPS
from dsc_serve.bench.compare.results import Contestant, Ratio, Results
from dsc_serve.bench.plot import Point, RangedPoint, line_chart, ratio_chart

LATENCIES = {  # table title, figures
    "Time to the first token, ms (p50, p99)": ("median_ttft_ms", "p99_ttft_ms"),
    "Time between tokens, ms (p50, p90, p99)": ("median_itl_ms", "p90_itl_ms", "p99_itl_ms"),
    "Time per output token, ms (p50, p99)": ("median_tpot_ms", "p99_tpot_ms"),
    "End to end, ms (p50, p99)": ("median_e2el_ms", "p99_e2el_ms"),
}
FIRST = "to-baseline"  # the chart that stands before everything else
CHARTS = {  # file name: title, label of the y axis, load, figure
    "throughput": ("Throughput", "output tokens per second", "closed", "output_throughput"),
    "itl-p50": ("Time between tokens, median", "milliseconds", "closed", "median_itl_ms"),
    "itl-p99": ("Time between tokens, 99th percentile", "milliseconds", "closed", "p99_itl_ms"),
    "ttft-p50": ("Time to the first token, median", "milliseconds", "closed", "median_ttft_ms"),
    "ttft-p99": ("Time to the first token, 99th percentile", "milliseconds", "closed", "p99_ttft_ms"),
    "e2el-p50": ("End to end, median", "milliseconds", "closed", "median_e2el_ms"),
    "goodput": ("Goodput", "requests per second within the limits", "open", "request_goodput"),
    "open-ttft-p99": ("Time to the first token, 99th percentile", "milliseconds", "open", "p99_ttft_ms"),
}
MORE = [name for name, (_, more) in FIGURES.items() if more]
PARTS = ("router", "again", "bank", "experts", "static", "attention", "head")
SPLIT = ("attention", "ffn", "norms", "head", "rest", "step")


def elements(results: Results) -> list[Element]:
    """The whole report but its title."""
    made: list[Element] = [Paragraph(text) for text in answer(results)]
    closed = charts(results, "closed")
    first = beside_baseline(results) or closed[:1]
    made += first
    made += [Heading("What was found"), Items(sentences(results)), *expected(results)]
    made += [Heading("Closed loops"), Paragraph(told(results)), *(chart for chart in closed if chart not in first)]
    made += closed_tables(results)
    if results.points("open"):
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in results.comparison["limits"].items())
        text = (
            f"Poisson arrivals for {results.comparison['rate_seconds']:g} s a round, at multiples of the most requests "
            f"per second that {results.comparison['baseline']} completed in a closed loop of the first round; limits: "
            f"{limits or 'none'}. Rates of completed requests count until the last has ended, after the arrivals."
        )
        made += [Heading("Open loads"), Paragraph(text), *charts(results, "open"), *open_tables(results)]
    made += [Heading("Where a step's time and bytes go"), *inside(results)]
    made += [Heading("What each system is"), systems_table(results), Items(commands(results))]
    return [*made, Heading("Machine and run"), Items(circumstances(results))]


def told(results: Results) -> str:
    c = results.comparison
    prompts = f"cut from {Path(c['prompt_file']).name}" if c["prompt_file"] else "random token ids"
    asked, done, temperature = c["rounds"], results.rounds, c.get("temperature", 0.0)
    drawn = f"drawn at temperature {temperature:g}" if temperature else "greedy"
    return (
        f"{c['waves']} requests of each stream and round (at least {LEAST_REQUESTS} together), prompts of "
        f"{c['prompt_tokens']} tokens ({prompts}), {c['output_tokens']} output tokens, {drawn}; the same prompts for "
        f"all. Medians over {done} {'' if done == asked else f'of {asked} '}interleaved rounds, also of each round's "
        f"percentiles. {chance(done)}"
    )


def chance(rounds: int) -> str:
    """What it means that all rounds agree."""
    if rounds < 2:
        return "One round cannot tell a difference from chance."
    return (
        f'"Wins" means that all {rounds} rounds agree; of two equal systems\' rounds, 1 in {2 ** (rounds - 1)} such '
        "sets agrees by chance."
    )


def expected(results: Results) -> list[Element]:
    def row(check: Check) -> Cells:
        wanted, ratio = check.expected, check.ratio
        measured = "–" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        what = FIGURES.get(wanted.figure, (wanted.figure,))[0]
        name = f"{what}, {results.label(wanted.subject)} / {results.label(wanted.against)}"
        return name, f"{wanted.streams}", check.demand, measured, check.reached

    found = checks(results)
    head = ("ratio", "streams", "aim", "median (rounds)", "reached")
    return [Table("What was aimed at", head, [row(check) for check in found])] if found else []


def closed_tables(results: Results) -> list[Element]:
    points = results.points("closed")
    head = ("streams", *(f"{value:g}" for value in points))

    def table(title: str, figures: Sequence[str]) -> Table:
        rows = []
        for name in results.measured():
            cells = [
                ", ".join(figure(results.median(name, "closed", value, one)) for one in figures) for value in points
            ]
            rows.append((results.label(name), *cells))
        return Table(title, head, rows)

    baseline = str(results.comparison["baseline"])

    def ratios(title: str, one: str) -> Table:
        rows = []
        for name in results.measured():
            found = [results.ratio(name, baseline, "closed", value, one) for value in points]
            rows.append((results.label(name), *(told_apart(ratio, one, name == baseline) for ratio in found)))
        return Table(title, head, rows)

    return [
        compared_table(results),
        table("Output tokens per second", ("output_throughput",)),
        ratios(f"Median time between tokens, to that of {results.label(baseline)}", "median_itl_ms"),
        ratios(f"Output tokens per second, to those of {results.label(baseline)}", "output_throughput"),
        *(table(title, figures) for title, figures in LATENCIES.items()),
        *prompt_steps(results, points),
        used(results, points),
    ]


def told_apart(ratio: Ratio | None, one: str, itself: bool) -> str:
    """A median of ratios where its rounds agree; where they do not, or it is near to 1, no difference."""
    if ratio is None:
        return "–"
    even = not itself and verdict(ratio, one in MORE) == "even"
    return "no difference" if even else f"{ratio.median:.2f}"


def prompt_steps(results: Results, points: Sequence[float]) -> list[Element]:
    """The share of steps with a part of a prompt, which are longer than the others: times have two humps."""
    rows = []
    for name in results.measured():
        shares = [results.median(name, "closed", value, PROMPT_STEPS) for value in points]
        if any(share is not None for share in shares):
            rows.append((results.label(name), *("–" if share is None else f"{share:.0%}" for share in shares)))
    title = "Steps that computed a part of a prompt too, of all steps; their tokens come later than others"
    return [Table(title, ("streams", *(f"{v:g}" for v in points)), rows)] if rows else []


def compared_table(results: Results) -> Table:
    head = ("systems", "figure", *(counted(value, "stream") for value in results.points("closed")))
    return Table(
        "How far from equal, median (rounds); * where all rounds agree, no difference where they do not",
        head,
        ratio_rows(results),
    )


def used(results: Results, points: Sequence[float]) -> Table:
    """Cores in use, so that one sees what the client and the waiting systems took."""

    def mean(name: str, value: float, field: str) -> float:
        rows = results.of(name, "closed", value)
        return sum(getattr(row, field) for row in rows) / len(rows) if rows else 0.0

    rows = [
        (
            results.label(name),
            *(
                f"{mean(name, value, 'server_cpu'):.2f}, "
                f"{figure(results.median(name, 'closed', value, 'client_cpu'))}, {mean(name, value, 'others_cpu'):.2f}"
                for value in points
            ),
        )
        for name in results.measured()
    ]
    return Table("Cores used (server, client, waiting systems)", ("streams", *(f"{v:g}" for v in points)), rows)


def open_tables(results: Results) -> list[Element]:
    points = results.points("open")
    head = ("load", *(f"{value:g}" for value in points))
    made: list[Element] = []
    for title, figures in {
        "Requests per second: mean rate of the arrivals, completed, within the limits": (
            "request_rate",
            "request_throughput",
            "request_goodput",
        ),
        "Time to the first token, ms (p50, p99)": ("median_ttft_ms", "p99_ttft_ms"),
        "Time between tokens, ms (p50, p90, p99)": ("median_itl_ms", "p90_itl_ms", "p99_itl_ms"),
        "End to end, ms (p50, p99)": ("median_e2el_ms", "p99_e2el_ms"),
    }.items():
        rows = [
            (
                results.label(name),
                *(", ".join(figure(results.median(name, "open", v, one)) for one in figures) for v in points),
            )
            for name in results.measured()
        ]
        made.append(Table(title, head, rows))
    return made


def beside_baseline(results: Results) -> list[Chart]:
    """Tokens per second of every system to the baseline's, with the range of the rounds; nothing without a baseline."""
    baseline = str(results.comparison["baseline"])
    series: dict[str, list[RangedPoint]] = {}
    for name in results.measured():
        for value in results.points("closed"):
            ratio = results.ratio(name, baseline, "closed", value, "output_throughput")
            if name != baseline and ratio is not None:
                told_apart = verdict(ratio, True) in ("better", "worse")
                point = RangedPoint(value, ratio.median, ratio.low, ratio.high, told_apart)
                series.setdefault(name, []).append(point)
    if not series:
        return []
    title = f"Output tokens per second, times those of {baseline}"
    rounds = counted(results.rounds, "round")
    note = f"more is better; median and range of {rounds}; an empty mark is no difference"
    label = "times the baseline's tokens per second"
    base = f"{baseline} (baseline) = 1"
    return [Chart(FIRST, title, ratio_chart(title, "streams at once", label, series, base, note, results.measured()))]


def charts(results: Results, load: str) -> list[Chart]:
    """Each with its units, the systems by name, and the baseline named."""
    made: list[Chart] = []
    baseline = str(results.comparison["baseline"])
    label = "streams at once" if load == "closed" else f"load, as a multiple of the peak of {baseline}"
    note = f"medians of {counted(results.rounds, 'round')}; baseline: {baseline}; both axes logarithmic"
    for name, (title, y_label, own_load, one) in CHARTS.items():
        if own_load != load:
            continue
        series: dict[str, list[Point]] = {}
        for system in results.measured():
            for value in results.points(load):
                median = results.median(system, load, value, one)
                if median:  # an axis of logarithms has no place for 0
                    shown = f"{system} (baseline)" if system == baseline else system
                    series.setdefault(shown, []).append((value, median))
        if series:
            better = "more is better" if one in MORE else "less is better"
            made.append(Chart(name, title, line_chart(title, label, y_label, series, f"{better}; {note}")))
    return made


def inside(results: Results) -> list[Element]:
    taken = [system for system in results.systems if system.steps]
    if not taken:
        return [Paragraph("No step was taken apart.")]
    split, read = [], []
    for system in taken:
        for running, step in system.steps.items():
            times, parts = step["milliseconds"], step["bytes"]
            name = results.label(system.name)
            split.append((name, running, *(f"{times.get(part, 0):.3f}" for part in SPLIT)))
            each = [f"{parts[part] / 1e3 / int(running):,.1f}" if part in parts else "" for part in PARTS]
            read.append((name, running, f"{step['distinct']:g}", *each, f"{sum(parts.values()) / 1e6:.1f}"))
    text = (
        "Decode steps of the engine alone, without HTTP; means, with the parts timed. Each system was profiled once, "
        "one after the other and not in rounds: compare the parts of one row; attention and head are the same work in "
        "every system, so what differs in them between rows is the machine's unrest. rest: everything else, from "
        "scheduling to handing the tokens on. Bytes are those of weights, each row that a step touches counted once "
        "(of a head screened in int8 without the few rows that are multiplied again); picks are those of the model on "
        "its own tokens."
    )
    return [
        Paragraph(text),
        Table("Milliseconds of a step", ("system", "running", *SPLIT), split),
        Table(
            "Kilobytes of weights per token",
            ("system", "running", "distinct picks", *PARTS, "MB per step"),
            read,
        ),
    ]


def systems_table(results: Results) -> Table:
    rows: list[Cells] = []
    measured = results.measured()
    for system in results.systems:
        what = system.description
        if system.skipped and system.name not in measured:
            rows.append((system.name, "skipped", "", "", "", "", "", ""))
            continue
        sizes = (what.get(name) for name in ("parameters", "active", "ffn_bytes"))
        rows.append(
            (
                results.label(system.name),
                "; ".join(filter(None, (what.get("ffn"), what.get("frame")))),
                *("–" if size is None else f"{size / 1e6:.1f}" for size in sizes),
                system.weights,
                f"{system.memory_bytes / 2**20:,.0f}",
                f"{system.start_s:.1f}",
            )
        )
    head = ("system", "model", "M parameters", "active", "MB of FFNs", "weights", "MiB in memory", "s to start")
    return Table("Systems", head, rows)


def commands(results: Results) -> list[str]:
    measured = results.measured()

    def line(system: Contestant) -> str:
        why = system.skipped.splitlines()[0] if system.skipped else ""
        if why and system.name not in measured:
            return f"{system.name} was skipped: {why}"
        ended = f"; it was not measured to the end: {why}" if why else ""
        return f"{system.name} ({system.version}): {system.command}{ended}"

    return [line(system) for system in results.systems]


def circumstances(results: Results) -> list[str]:
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.machine.items())
    return [results.client, results.date, machine, f"seed {results.comparison['seed']}"]


def html_page(results: Results) -> str:
    """One self-contained page."""
    return page(results.title, elements(results))


def markdown(results: Results, plots: str, shown_charts: Sequence[str]) -> str:
    """Headings of the third level, tables, and links to those charts, which lie in the folder `plots`."""
    return markdown_of(elements(results), plots, shown_charts)


ALL_CHARTS = (FIRST, *CHARTS)


def write_charts(results: Results, stem: Path, names: Sequence[str]) -> None:
    """Those charts as SVG files whose names begin with the stem's."""
    for element in elements(results):
        if isinstance(element, Chart) and element.name in names:
            stem.with_name(f"{stem.name}-{element.name}.svg").write_text(element.svg, encoding="utf-8")
