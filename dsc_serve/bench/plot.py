"""Line charts with logarithmic axes as self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 230, 56, 60
COLORS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#5f3dc4", "#087f5b", "#e67700", "#495057", "#1864ab")
DASHES = ("", "7 4", "2 3", "9 3 2 3")

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
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#212529">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 28, title, "start", ' font-size="15" font-weight="bold"'),
        text(LEFT, 45, note, "start", ' fill="#495057"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, x_label),
        text(
            20, (TOP + HEIGHT - BOTTOM) / 2, y_label, extra=f' transform="rotate(-90 20 {(TOP + HEIGHT - BOTTOM) / 2})"'
        ),
    ]
    for x in xs:
        parts.append(line(x_axis.at(x), TOP, x_axis.at(x), HEIGHT - BOTTOM, 'stroke="#e9ecef"'))
        parts.append(text(x_axis.at(x), HEIGHT - BOTTOM + 18, number(x)))
    for y in ticks:
        parts.append(line(LEFT, y_axis.at(y), WIDTH - RIGHT, y_axis.at(y), 'stroke="#e9ecef"'))
        parts.append(text(LEFT - 8, y_axis.at(y) + 4, number(y), "end"))
    groups = list(dict.fromkeys(name.split()[0] for name in series))
    seen: dict[str, int] = {}
    for row, (name, line_points) in enumerate(series.items()):
        group = name.split()[0]
        color, dash = COLORS[groups.index(group) % len(COLORS)], DASHES[seen.get(group, 0) % len(DASHES)]
        seen[group] = seen.get(group, 0) + 1
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash or "none"}"'
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in sorted(line_points))
        parts.append(f'<polyline points="{path}" {style}/>')
        parts += [
            f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3" fill="{color}"/>' for x, y in line_points
        ]
        legend = TOP + 10 + 20 * row
        parts.append(line(WIDTH - RIGHT + 16, legend, WIDTH - RIGHT + 46, legend, style))
        parts.append(text(WIDTH - RIGHT + 54, legend + 4, name, "start"))
    return "\n".join([*parts, "</svg>", ""])
