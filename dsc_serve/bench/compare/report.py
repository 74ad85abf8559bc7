"""The report of a comparison, from its results alone: blocks that become one HTML page, or Markdown with SVG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dsc_serve.bench.compare.comparison import LEAST_REQUESTS, ComparisonError
from dsc_serve.bench.compare.findings import Check, checks, counted, ratio_rows, sentences
from dsc_serve.bench.compare.results import Contestant, Results
from dsc_serve.bench.plot import Point, line_chart

Cells = Sequence[str]

LATENCIES = {  # table title, figures
    "Time to the first token, ms (p50, p99)": ("median_ttft_ms", "p99_ttft_ms"),
    "Time between tokens, ms (p50, p99)": ("median_itl_ms", "p99_itl_ms"),
    "Time per output token, ms (p50, p99)": ("median_tpot_ms", "p99_tpot_ms"),
    "End to end, ms (p50, p99)": ("median_e2el_ms", "p99_e2el_ms"),
}
CHARTS = {  # file name: title, label of the y axis, load, figure
    "throughput": ("Throughput", "tokens per second", "closed", "output_throughput"),
    "itl-p50": ("Time between tokens, median", "milliseconds", "closed", "median_itl_ms"),
    "itl-p99": ("Time between tokens, 99th percentile", "milliseconds", "closed", "p99_itl_ms"),
    "ttft-p50": ("Time to the first token, median", "milliseconds", "closed", "median_ttft_ms"),
    "ttft-p99": ("Time to the first token, 99th percentile", "milliseconds", "closed", "p99_ttft_ms"),
    "e2el-p50": ("End to end, median", "milliseconds", "closed", "median_e2el_ms"),
    "goodput": ("Goodput", "requests per second within the limits", "open", "request_goodput"),
    "open-ttft-p99": ("Time to the first token, 99th percentile", "milliseconds", "open", "p99_ttft_ms"),
}
PARTS = ("router", "again", "bank", "experts", "static", "attention", "head")
SPLIT = ("attention", "ffn", "norms", "head", "rest", "step")


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    title: str
    head: Cells
    rows: Sequence[Cells]


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    svg: str


Element = Heading | Paragraph | Items | Table | Chart


def figure(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def elements(results: Results) -> list[Element]:
    """The whole report but its title."""
    made: list[Element] = [Heading("What was found"), Items(sentences(results)), *expected(results)]
    made += [Heading("Closed loops"), Paragraph(told(results)), *closed_tables(results), *charts(results, "closed")]
    if results.points("open"):
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in results.comparison["limits"].items())
        text = (
            f"Poisson arrivals for {results.comparison['rate_seconds']:g} s a round, at multiples of the most requests "
            f"per second that {results.comparison['baseline']} completed in a closed loop of the first round; limits: "
            f"{limits or 'none'}. Rates of completed requests count until the last has ended, after the arrivals."
        )
        made += [Heading("Open loads"), Paragraph(text), *open_tables(results), *charts(results, "open")]
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
        name = f"{wanted.figure}, {results.label(wanted.subject)} / {results.label(wanted.against)}"
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
            rows.append((results.label(name), *("–" if ratio is None else f"{ratio.median:.2f}" for ratio in found)))
        return Table(title, head, rows)

    return [
        compared_table(results),
        table("Output tokens per second", ("output_throughput",)),
        ratios(f"Median time between tokens, to that of {results.label(baseline)}", "median_itl_ms"),
        ratios(f"Output tokens per second, to those of {results.label(baseline)}", "output_throughput"),
        *(table(title, figures) for title, figures in LATENCIES.items()),
        used(results, points),
    ]


def compared_table(results: Results) -> Table:
    head = ("systems", "figure", *(counted(value, "stream") for value in results.points("closed")))
    return Table("How far from equal, median (rounds); * where all rounds agree", head, ratio_rows(results))


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
        "Time between tokens, ms (p50, p99)": ("median_itl_ms", "p99_itl_ms"),
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


def charts(results: Results, load: str) -> list[Element]:
    made: list[Element] = []
    label = "streams" if load == "closed" else "load, as a multiple of the baseline's peak"
    for name, (title, y_label, own_load, one) in CHARTS.items():
        if own_load != load:
            continue
        series: dict[str, list[Point]] = {}
        for system in results.measured():
            for value in results.points(load):
                median = results.median(system, load, value, one)
                if median:  # an axis of logarithms has no place for 0
                    series.setdefault(system, []).append((value, median))
        if series:
            made.append(Chart(name, title, line_chart(title, label, y_label, series)))
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


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #212529 }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: 0.3em 0 }
th, td { padding: 0.25em 0.7em; border-bottom: 1px solid #dee2e6; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
li { overflow-wrap: anywhere }
"""


def html_page(results: Results) -> str:
    """One self-contained page."""
    return page(results.title, elements(results))


def page(title: str, made: Sequence[Element]) -> str:
    """The same of any blocks."""
    parts: list[str] = []
    for at, block in enumerate(made):
        if isinstance(block, Chart) and not isinstance(made[at - 1], Chart):
            parts.append('<div class="charts">')
        parts.append(html_block(block))
        if isinstance(block, Chart) and not isinstance(made[at + 1], Chart):
            parts.append("</div>")
    name = escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def html_block(block: Element) -> str:
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in block.texts) + "</ul>"
    if isinstance(block, Chart):
        return f"<div>{block.svg}</div>"
    head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f"<table><caption>{escape(block.title)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def markdown(results: Results, plots: str, shown_charts: Sequence[str]) -> str:
    """Headings of the third level, tables, and links to those charts, which lie in the folder `plots`."""
    return markdown_of(elements(results), plots, shown_charts)


def markdown_of(made: Sequence[Element], plots: str = "", shown_charts: Sequence[str] = ()) -> str:
    """The same of any blocks."""
    parts = []
    for block in made:
        if isinstance(block, Heading):
            parts.append(f"### {block.text}")
        elif isinstance(block, Paragraph):
            parts.append(block.text)
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {text}" for text in block.texts))
        elif isinstance(block, Chart):
            if block.name in shown_charts:
                parts.append(f"![{block.title}]({plots}-{block.name}.svg)")
        else:
            rows = [f"| {' | '.join(cells)} |" for cells in (block.head, *block.rows)]
            rows.insert(1, "|" + "---|" * len(block.head))
            parts.append(f"{block.title}:\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def audited(raw: str) -> str:
    """The line that leads from a page of tables to the file of results that they were made from."""
    return f"Every figure of every round: [{raw}]({raw})."


def write_charts(results: Results, stem: Path, names: Sequence[str]) -> None:
    """Those charts as SVG files whose names begin with the stem's."""
    for block in elements(results):
        if isinstance(block, Chart) and block.name in names:
            stem.with_name(f"{stem.name}-{block.name}.svg").write_text(block.svg, encoding="utf-8")


def put_into(document: str, name: str, text: str) -> str:
    """The document with what stands between its marks of this name replaced. Raises ComparisonError without marks."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(document):
        raise ComparisonError(f"the document has no place for {name}: lines {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", document)
