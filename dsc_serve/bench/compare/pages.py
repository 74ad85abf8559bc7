"""Pages of what was measured: made of kept results, put into documents, and made again by who audits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsc_serve.bench.compare.elements import Chart, MeasuredPage, audited, markdown_of, put_into
from dsc_serve.bench.compare.report import ALL_CHARTS, elements, html_page, markdown, write_charts
from dsc_serve.bench.compare.results import Results, is_compared, load_results

RESULTS = "results.json"
PLOTS = "plots"  # the folder of charts beside a document
BENCHMARKS = "benchmarks.md"  # which says how all is measured, in the folder above the pages


def page_of(raw: Path, name: str, charts: Sequence[str] = ()) -> MeasuredPage:
    """What a file of results makes of the page `name`: of a comparison of servers, of one of speculation, or of what
    another command kept by --json. charts: those that are shown. Raises ComparisonError and UnknownResultsError."""
    from dsc_serve.bench.compare.speculation import found, page
    from dsc_serve.bench.decide import decide_page
    from dsc_serve.bench.decide.checked import is_decision
    from dsc_serve.bench.step.kept import kind_of, load_kept, markdown_of_kept

    if found.is_kept_in(raw):
        drafted = found.load(raw)
        made = page.elements(drafted)
        plots = {f"{name}-{one.name}.svg": one.svg for one in made if isinstance(one, Chart)}
        shown = [one.name for one in made if isinstance(one, Chart)]
        return MeasuredPage(page.TITLE, drafted.client, markdown_of(made, f"{PLOTS}/{name}", shown), plots)
    if is_decision(raw):
        return decide_page.measured_page(decide_page.load_decision(raw))
    if raw.is_file() and not is_compared(raw):
        kept = load_kept(raw)
        kind = kind_of(kept)
        title = f"dsc-serve bench {kind}" if name == kind else f"dsc-serve bench {kind}: {name}"
        return MeasuredPage(title, kept["command"], markdown_of_kept(kept))
    results = load_results(raw)
    plots = {
        f"{name}-{element.name}.svg": element.svg
        for element in elements(results)
        if isinstance(element, Chart) and element.name in charts
    }
    return MeasuredPage(results.title, results.client, markdown(results, f"{PLOTS}/{name}", charts), plots)


def page_part(made: MeasuredPage, raw: str) -> str:
    """What stands between a page's marks. raw: the file beside it that this is made of."""
    return f"{audited(raw)}\n\n{made.text}"


def write_page(into: Path, name: str, made: MeasuredPage, raw: bytes) -> None:
    """Put what was measured into a document, and its charts and results beside it; a document that is not there is
    made. Raises ComparisonError where the document has no place of this name."""
    source = into.with_name(f"{name}.{RESULTS}")
    write_part(into, name, page_part(made, source.name), head_of(into, made))
    if made.plots:
        (into.parent / PLOTS).mkdir(exist_ok=True)
    for file, svg in made.plots.items():
        (into.parent / PLOTS / file).write_text(svg, encoding="utf-8")
    source.write_bytes(raw)


def write_part(into: Path, name: str, text: str, head: str) -> None:
    """The same of text that is made of several results. head: of a document that is not there yet."""
    new = f"{head}\n\n<!-- {name}: begin -->\n<!-- {name}: end -->\n"
    before = into.read_text(encoding="utf-8") if into.is_file() else new
    into.write_text(put_into(before, name, text), encoding="utf-8")


def head_of(into: Path, made: MeasuredPage) -> str:
    """How a page begins that nobody has written yet."""
    above = into.parent.parent / BENCHMARKS
    told = f"; [{BENCHMARKS}](../{BENCHMARKS}) says how it measures and what follows" if above.is_file() else ""
    return f"# {made.title}\n\n`{made.command}` makes these tables{told}."


def write_reports(folder: Path, raw: Path, parts: Mapping[str, Path]) -> str:
    """Reports beside their results; what one command kept by --json as text. Returns what to say."""
    from dsc_serve.bench.compare.speculation import found, running

    if raw.is_file() and raw.name != RESULTS and not found.is_kept_in(raw):
        return page_of(raw, raw.stem).text
    for file in parts.values() or (raw,):
        if found.is_kept_in(file):
            running.write_report(found.load(file), file.parent)
        else:
            write_report(load_results(file), file.parent)
    return f"{folder / '*' / 'report.html' if parts else raw.with_name('report.html')} has the report"


def write_report(results: Results, out: Path) -> None:
    """One page, and its charts as SVG."""
    (out / "report.html").write_text(html_page(results), encoding="utf-8")
    write_charts(results, out / "chart", ALL_CHARTS)
