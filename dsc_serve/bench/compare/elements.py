"""What reports are made of: elements that become one HTML page, or Markdown with charts beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from dsc_serve.bench.compare.comparison import ComparisonError

Cells = Sequence[str]


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


@dataclass(frozen=True)
class MeasuredPage:
    """What results make of a page."""

    title: str
    command: str
    text: str  # its measured part, in Markdown
    plots: Mapping[str, str] = field(default_factory=dict)  # its charts as SVG, by file name


def figure(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 1.5em auto; padding: 0 1em;
  color: #212529; background: #fff }
h1 { font-size: 1.6em; margin: 0.3em 0 }
.answer p { font-size: 1.1em; margin: 0.4em 0 }
table { border-collapse: collapse; width: 100%; margin: 0.5em 0 1.5em; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: 0.3em 0 }
th, td { padding: 0.25em 0.7em; border-bottom: 1px solid #dee2e6; text-align: right; vertical-align: top }
th:first-child, td:first-child, .words { text-align: left }
svg { width: 100%; height: auto }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.answer svg { max-width: 880px; max-height: 70vh }
li { overflow-wrap: anywhere }
@media screen and (max-width: 800px) {
  .charts { grid-template-columns: 1fr }
  table { display: block; overflow-x: auto }
}
@media print {
  @page { size: A4; margin: 14mm }
  body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0 }
  table { font-size: 8pt }
  th, td { padding: 0.2em 0.4em }
  .charts { display: block }
  .charts svg, .answer svg { max-width: 140mm; max-height: none }
  .chart, tr, li { break-inside: avoid }
  table.short { break-inside: avoid }
  h2, caption, thead { break-after: avoid }
}
"""
SHORT = 14  # rows of a table that a page of paper does not divide
WORDS = re.compile(r"(?!no difference)[A-Za-z]|\d+th ")  # how a cell begins that is read as words, not as a figure


def page(title: str, made: Sequence[Element]) -> str:
    """One self-contained page. What stands before the first heading is the answer, and looks like it."""
    parts: list[str] = ['<div class="answer">']
    opened = True
    for at, element in enumerate(made):
        if opened and isinstance(element, Heading):
            parts.append("</div>")
            opened = False
        before, after = made[at - 1 : at], made[at + 1 : at + 2]
        if isinstance(element, Chart) and not (before and isinstance(before[0], Chart)):
            several = after and isinstance(after[0], Chart)
            parts.append('<div class="charts">' if several else "<div>")
        parts.append(html_element(element))
        if isinstance(element, Chart) and not (after and isinstance(after[0], Chart)):
            parts.append("</div>")
    parts += ["</div>"] if opened else []
    name = escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def html_element(element: Element) -> str:
    if isinstance(element, Heading):
        return f"<h2>{escape(element.text)}</h2>"
    if isinstance(element, Paragraph):
        return f"<p>{escape(element.text)}</p>"
    if isinstance(element, Items):
        return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in element.texts) + "</ul>"
    if isinstance(element, Chart):
        return f'<div class="chart">{element.svg}</div>'
    worded = [
        all(WORDS.match(cell) for row in element.rows for cell in row[at : at + 1] if cell)
        for at in range(len(element.head))
    ]

    def cells(tag: str, row: Cells) -> str:
        looks = [' class="words"' if at and words else "" for at, words in enumerate(worded)]
        return "".join(f"<{tag}{look}>{escape(cell)}</{tag}>" for look, cell in zip(looks, row, strict=False))

    head, rows = cells("th", element.head), "".join(f"<tr>{cells('td', row)}</tr>" for row in element.rows)
    short = ' class="short"' if len(element.rows) <= SHORT else ""
    caption = escape(element.title)
    return f"<table{short}><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def markdown_of(made: Sequence[Element], plots: str = "", shown_charts: Sequence[str] = ()) -> str:
    """The same of any elements."""
    parts = []
    for element in made:
        if isinstance(element, Heading):
            parts.append(f"### {element.text}")
        elif isinstance(element, Paragraph):
            parts.append(element.text)
        elif isinstance(element, Items):
            parts.append("\n".join(f"- {text}" for text in element.texts))
        elif isinstance(element, Chart):
            if element.name in shown_charts:
                parts.append(f"![{element.title}]({plots}-{element.name}.svg)")
        else:
            rows = [f"| {' | '.join(cells)} |" for cells in (element.head, *element.rows)]
            rows.insert(1, "|" + "---|" * len(element.head))
            parts.append(f"{element.title}:\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def audited(raw: str) -> str:
    """The line that leads from a page of tables to the file of results that they were made from."""
    return f"Every figure of every round: [{raw}]({raw})."


def put_into(document: str, name: str, text: str) -> str:
    """The document with what stands between its marks of this name replaced. Raises ComparisonError without marks."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(document):
        raise ComparisonError(f"the document has no place for {name}: lines {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", document)
