"""What a reader of the comparison sees first: its question answered in three sentences and one chart."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.bench.compare.comparison import MIXTURES
from dsc_serve.bench.compare.elements import Chart, Element, Paragraph
from dsc_serve.bench.compare.findings import counted, verdict
from dsc_serve.bench.compare.results import Ratio
from dsc_serve.bench.compare.speculation.found import SpeculationResults
from dsc_serve.bench.plot import Point, line_chart

USUAL = 0.7  # how often drafts are right in the sentences, or the nearest rate that was measured


def first_screen(results: SpeculationResults, subject: str, baseline: str) -> list[Element]:
    """Of the largest preset of equal sizes that was measured; nothing where nothing was."""
    if not results.drafted:
        return []
    presets = list(dict.fromkeys(row.preset for row in results.drafted))
    preset = next((name for name in reversed(presets) if name not in MIXTURES), presets[-1])
    rows = [row for row in results.drafted if row.preset == preset]
    rates = sorted({row.rate for row in rows if row.rate is not None})
    streams = sorted({row.streams for row in rows})
    if not rates:
        return []
    rate = min(rates, key=lambda one: abs(one - USUAL))
    systems = [name for name in dict.fromkeys(row.system for row in rows) if name in (subject, baseline)]
    gains = "; ".join(f"{name} {by_streams(results, preset, streams, (name, rate), (name, None))}" for name in systems)
    found = [f"Drafts that are right {rate:g} of the time, to none, times as many tokens at preset {preset}: {gains}."]
    if len(systems) == 2:
        pairs = {
            f"with them {subject} / {baseline}": ((subject, rate), (baseline, rate)),
            "without": ((subject, None), (baseline, None)),
        }
        told = "; ".join(f"{name} {by_streams(results, preset, streams, *pair)}" for name, pair in pairs.items())
        found.append(f"Times as many tokens, {told}.")
    rounds = counted(len({row.round for row in rows}), "round")
    found.append(f"Medians of {rounds}; a ratio whose rounds disagree is no finding.")
    return [*(Paragraph(text) for text in found), chart(results, preset, streams, rate, baseline, rounds)]


def by_streams(
    results: SpeculationResults,
    preset: str,
    streams: Sequence[int],
    one: tuple[str, float | None],
    other: tuple[str, float | None],
) -> str:
    """Medians where rounds agree."""
    told = []
    for count in streams:
        ratio = results.ratio(preset, count, one, other)
        if ratio is not None:
            told.append(f"{said(ratio)} at {count}")
    return f"{', '.join(told)} streams" if told else "not measured"


def said(ratio: Ratio) -> str:
    return "no difference" if verdict(ratio, True) == "even" else f"{ratio.median:.2f}"


def chart(
    results: SpeculationResults, preset: str, streams: Sequence[int], rate: float, baseline: str, rounds: str
) -> Chart:
    """Tokens per second of all streams, without and with drafts."""
    series: dict[str, list[Point]] = {}
    systems = dict.fromkeys(row.system for row in results.drafted if row.preset == preset)
    for system in systems:
        for own, name in ((None, "no drafts"), (rate, f"right {rate:g}")):
            label = f"{system} {name}{' (baseline)' if system == baseline else ''}"
            for count in streams:
                ms = results.median(preset, system, count, own, "ms")
                if ms:
                    series.setdefault(label, []).append((count, 1e3 * count / ms))
    title = f"Throughput without and with drafts, preset {preset}"
    note = f"more is better; medians of {rounds}; baseline: {baseline}; both axes logarithmic"
    return Chart("drafts", title, line_chart(title, "streams at once", "output tokens per second", series, note))
