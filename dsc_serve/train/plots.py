"""Curves of a run as self-contained SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 820, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 48, 52
COLORS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#5f3dc4", "#087f5b", "#e67700", "#495057", "#1864ab")

Point = tuple[float, float]


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low to high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """An SVG of one line per series of points (x, y), in order, on linear axes. Raises ValueError without points."""
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("a chart needs at least one point")
    xs, ys = (ticks(min(values), max(values)) for values in zip(*points, strict=True))

    def across(x: float) -> float:
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, content: str, anchor: str = "middle", extra: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'

    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#212529">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 26, title, "start", ' font-size="15" font-weight="bold"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label),
        text(18, middle, y_label, extra=f' transform="rotate(-90 18 {middle})"'),
    ]
    for x in xs:
        parts.append(text(across(x), HEIGHT - BOTTOM + 18, f"{x:g}"))
    for y in ys:
        height = up(y)
        parts.append(f'<line x1="{LEFT}" y1="{height:.1f}" x2="{WIDTH - RIGHT}" y2="{height:.1f}" stroke="#e9ecef"/>')
        parts.append(text(LEFT - 8, height + 4, f"{y:g}", "end"))
    for row, (name, line) in enumerate(series.items()):
        style = f'fill="none" stroke="{COLORS[row % len(COLORS)]}" stroke-width="1.8"'
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" {style}/>')
        legend = TOP + 10 + 18 * row
        parts.append(f'<line x1="{WIDTH - RIGHT + 14}" y1="{legend}" x2="{WIDTH - RIGHT + 38}" y2="{legend}" {style}/>')
        parts.append(text(WIDTH - RIGHT + 46, legend + 4, name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def curve(lines: Sequence[Mapping[str, Any]], field: str) -> list[Point]:
    """The field of every log line that has it, against millions of tokens trained."""
    points, tokens = [], 0
    for line in lines:
        tokens = line.get("tokens", tokens)
        if field in line:
            points.append((tokens / 1e6, line[field]))
    return points


def layer_curves(lines: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[Point]]:
    named = [line for line in lines if line.get(field)]
    layers = len(named[0][field]) if named else 0
    return {f"layer {i}": [(line["tokens"] / 1e6, line[field][i]) for line in named] for i in range(layers)}


def write_plots(lines: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """loss.svg, and where the FFN has them usage.svg and signal.svg; returns the files written."""
    charts = {
        "loss": (
            "Loss",
            "nats per token",
            {"trained": curve(lines, "loss"), "held out": curve(lines, "held_out_loss")},
        ),
        "usage": ("Bank used between two log lines", "share of the bank", layer_curves(lines, "used")),
        "signal": ("Mean signal S", "S", layer_curves(lines, "signal")),
    }
    written = []
    for name, (title, y_label, series) in charts.items():
        if any(series.values()):
            file = folder / f"{name}.svg"
            file.write_text(line_chart(title, "million tokens", y_label, series), "utf8")
            written.append(file)
    return written
