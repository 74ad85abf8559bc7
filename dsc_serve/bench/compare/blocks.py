"""What reports are made of: blocks that become one HTML page, or Markdown with charts beside it."""

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
    """What results make of a page. text: its measured part, in Markdown; plots: its charts as SVG, by file name."""

    title: str
    command: str
    text: str
    plots: Mapping[str, str] = field(default_factory=dict)


def figure(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


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


def page(title: str, made: Sequence[Element]) -> str:
    """The same of any blocks."""
    parts: list[str] = []
    for at, block in enumerate(made):
        before, after = made[at - 1 : at], made[at + 1 : at + 2]
        if isinstance(block, Chart) and not (before and isinstance(before[0], Chart)):
            several = after and isinstance(after[0], Chart)
            parts.append('<div class="charts">' if several else "<div>")
        parts.append(html_block(block))
        if isinstance(block, Chart) and not (after and isinstance(after[0], Chart)):
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


def put_into(document: str, name: str, text: str) -> str:
    """The document with what stands between its marks of this name replaced. Raises ComparisonError without marks."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(document):
        raise ComparisonError(f"the document has no place for {name}: lines {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", document)
