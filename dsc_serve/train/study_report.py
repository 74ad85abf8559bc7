"""The study's results as a table and charts."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsc_serve.machine import read_text
from dsc_serve.train.plots import curve, line_chart
from dsc_serve.train.record import read_log

Runs = Sequence[dict[str, Any]]


def machine() -> str:
    """The processor's name as the system gives it."""
    for line in read_text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def grouped(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    entries: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        entries.setdefault(run["entry"], []).append(run)
    return entries


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean, and half of the range where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(result: dict[str, Any], command: str, date: str) -> str:
    """Markdown: one row per entry, means over seeds and half the range between them."""
    runs = result["runs"]
    if not runs:
        return "No run has finished.\n"
    seeds = sorted({run["seed"] for run in runs})
    tokens = runs[0]["tokens"]
    lines = [
        f"`{command}`, {date}, {machine()}, {runs[0]['threads']} threads: {result['steps']:,} steps, "
        f"{tokens / 1e6:.2f} M tokens a run ({tokens / runs[0]['corpus_tokens']:.2f} epochs), seeds "
        f"{', '.join(map(str, seeds))}. Means over the seeds ± half of the range between them.",
        "",
        "| FFN | parameters | active | held-out loss, nats/token | bits/byte | training, s | never picked, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in grouped(runs).items():
        dead = [100 * sum(run["dead"]) / run["members"] for run in own if run["members"]]
        cells = [
            name if len(own) == len(seeds) else f"{name} ({len(own)} of {len(seeds)} seeds)",
            f"{own[0]['parameters']:,}",
            f"{own[0]['active_parameters']:,}",
            spread([run["held_out_loss"] for run in own]),
            spread([run["held_out_bits_per_byte"] for run in own]),
            spread([run["training_seconds"] for run in own], 0),
            spread(dead, 1) if dead else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if result["skipped"]:
        lines += ["", f"Not finished within the time limit: {'; '.join(result['skipped'])}."]
    return "\n".join(lines) + "\n"


def charts(folder: Path, runs: Runs, out: Path) -> list[Path]:
    """study_loss.svg: held-out loss of every entry's first seed; returns the files written."""
    series = {}
    for name, own in grouped(runs).items():
        series[name] = curve(read_log(folder / f"{name}-seed{own[0]['seed']}" / "log.jsonl"), "held_out_loss")[1:]
    if not any(series.values()):
        return []
    file = out / "study_loss.svg"
    file.write_text(line_chart("Held-out loss", "million tokens", "nats per token", series), "utf8")
    return [file]
