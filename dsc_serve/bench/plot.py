"""Charts as self-contained SVG: lines over logarithmic axes, and ratios to a baseline with their range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 680, 400  # so that two side by side are read on a screen, and one on paper
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 56, 50
COLORS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#5f3dc4", "#087f5b", "#e67700", "#495057", "#1864ab")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
GRID = 'stroke="#e9ecef"'

Point = tuple[float, float]


class Axis:
    """A logarithmic axis from value `low` at pixel `start` to value `high` at pixel `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return self.start + share * (self.end - self.start)


def decades(low: float, high: float) -> list[float]:
    """Powers of ten with 2 and 5 times them, from the largest at or below `low` to the smallest at or above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    above = [tick for tick in ticks if tick >= high]
    below = [tick for tick in ticks if tick <= low]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def text(x: float, y: float, content: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def opening(title: str, note: str, x_label: str, y_label: str) -> list[str]:
    """What all charts begin with."""
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#212529">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 24, title, "start", ' font-size="15" font-weight="bold"'),
        text(LEFT, 42, note, "start", ' fill="#495057"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label),
        text(16, middle, y_label, extra=f' transform="rotate(-90 16 {middle})"'),
    ]


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash for each name; equal first words share a colour."""
    found: dict[str, tuple[str, str]] = {}
    groups: dict[str, int] = {}
    for name in names:
        group = name.split()[0]
        groups[group] = groups.get(group, -1) + 1
        color = COLORS[list(groups).index(group) % len(COLORS)]
        found[name] = color, DASHES[groups[group] % len(DASHES)] or "none"
    return found


def legend(row: int, name: str, sample: str) -> list[str]:
    """A line of it. sample: what stands before the name, between WIDTH − RIGHT + 14 and 26 more, at `legend_y`."""
    return [sample, text(WIDTH - RIGHT + 46, legend_y(row) + 4, name, "start")]


def legend_y(row: int) -> float:
    return TOP + 10 + 20 * row


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]], note: str = "") -> str:
    """An SVG of one line per series of positive (x, y), its x values as ticks; equal first words share a colour.

    note: under the title, such as what is compared with what.

    Raises ValueError where there is no point, or one that has no logarithm.
    """
    points = [point for line_points in series.values() for point in line_points]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError("a chart with logarithmic axes needs at least one point, and positive ones only")
    xs, ticks = sorted({x for x, _ in points}), decades(min(y for _, y in points), max(y for _, y in points))
    x_axis = Axis(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_axis = Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = opening(title, note, x_label, y_label)
    for x in xs:
        parts.append(line(x_axis.at(x), TOP, x_axis.at(x), HEIGHT - BOTTOM, GRID))
        parts.append(text(x_axis.at(x), HEIGHT - BOTTOM + 18, number(x)))
    for y in ticks:
        parts.append(line(LEFT, y_axis.at(y), WIDTH - RIGHT, y_axis.at(y), GRID))
        parts.append(text(LEFT - 8, y_axis.at(y) + 4, number(y), "end"))
    looks = styles(series)
    for row, (name, line_points) in enumerate(series.items()):
        color, dash = looks[name]
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in sorted(line_points))
        parts.append(f'<polyline points="{path}" {style}/>')
        parts += [
            f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3" fill="{color}"/>' for x, y in line_points
        ]
        y = legend_y(row)
        parts += legend(row, name, line(WIDTH - RIGHT + 14, y, WIDTH - RIGHT + 40, y, style))
    return "\n".join([*parts, "</svg>", ""])


class RangedPoint(NamedTuple):
    """A ratio with the range of its rounds."""

    x: float
    median: float
    low: float
    high: float
    told: bool  # whether it is a difference at all


def ratio_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[RangedPoint]],
    baseline: str,
    note: str = "",
    names: Iterable[str] = (),
) -> str:
    """An SVG of ratios by series and x, side by side at each x, with the line of the baseline, which is 1.

    A full mark is a difference, an empty one none. names: all that other charts show, in their order, so that colours
    are the same there. Raises ValueError where there is no point.
    """
    points = [point for own in series.values() for point in own]
    if not points:
        raise ValueError("a chart needs at least one point")
    xs = sorted({point.x for point in points})
    ticks = even_ticks(min(1.0, *(p.low for p in points)), max(1.0, *(p.high for p in points)))
    slot = (WIDTH - RIGHT - LEFT) / len(xs)

    def at(value: float) -> float:
        return HEIGHT - BOTTOM + (TOP - HEIGHT + BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = opening(title, note, x_label, y_label)
    for tick in ticks:
        parts.append(line(LEFT, at(tick), WIDTH - RIGHT, at(tick), GRID))
        parts.append(text(LEFT - 8, at(tick) + 4, f"{tick:.10g}", "end"))
    for i, x in enumerate(xs):
        parts.append(text(LEFT + (i + 0.5) * slot, HEIGHT - BOTTOM + 18, number(x)))
        if i:
            parts.append(line(LEFT + i * slot, TOP, LEFT + i * slot, HEIGHT - BOTTOM, GRID))
    base = 'stroke="#212529" stroke-width="1.5"'
    parts.append(line(LEFT, at(1.0), WIDTH - RIGHT, at(1.0), base))
    parts += legend(0, baseline, line(WIDTH - RIGHT + 14, legend_y(0), WIDTH - RIGHT + 40, legend_y(0), base))
    looks = styles(dict.fromkeys((*names, *series)))
    for row, (name, own) in enumerate(series.items(), start=1):
        color, dash = looks[name]
        shift = slot * (row / (len(series) + 1) - 0.5)
        for point in own:
            x = LEFT + (xs.index(point.x) + 0.5) * slot + shift
            bar = f'stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(line(x, at(point.low), x, at(point.high), bar))
            parts.append(mark(x, at(point.median), color, point.told))
        style = f'stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
        sample = line(WIDTH - RIGHT + 14, legend_y(row), WIDTH - RIGHT + 40, legend_y(row), style)
        parts += legend(row, name, sample + mark(WIDTH - RIGHT + 27, legend_y(row), color, True))
    return "\n".join([*parts, "</svg>", ""])


def mark(x: float, y: float, color: str, full: bool) -> str:
    inside = color if full else "#ffffff"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{color}" stroke-width="2" fill="{inside}"/>'


def even_ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers at equal distances, around both; from 0 on where the largest is far from the least."""
    low = 0.0 if high > 2 * low else low
    rough = (high - low or 0.1) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]
