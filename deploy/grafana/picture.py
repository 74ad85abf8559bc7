"""Plots what a Prometheus answers to the dashboard: `python deploy/grafana/picture.py URL SECONDS FILE.svg`."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter, PercentFormatter

FILE = Path(__file__).parent / "dsc-serve.json"
COLUMNS, POINTS = 3, 40
FORMATS = {"s": EngFormatter("s"), "bytes": EngFormatter("B"), "percentunit": PercentFormatter(1)}


@dataclass(frozen=True)
class Query:
    """Of the panel `title`, whose curves are named by `legend`."""

    title: str
    unit: str
    legend: str
    expr: str


def queries(interval: str) -> list[Query]:
    """Of the dashboard, with all jobs and instances chosen; interval: what Grafana would take for $__rate_interval."""
    found = []
    for panel in json.loads(FILE.read_text())["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$__rate_interval", interval)
            expr = expr.replace("$job", ".*").replace("$instance", ".*")
            legend = target["legendFormat"].replace("__auto", "")
            found.append(Query(panel["title"], panel["fieldConfig"]["defaults"]["unit"], legend, expr))
    return found


def ask(url: str, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """The result of a query of Prometheus' HTTP API."""
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def draw(url: str, seconds: float, file: Path) -> None:
    end = time.time()
    step = max(1, math.ceil(seconds / POINTS))
    panels: dict[str, list[Query]] = {}
    for query in queries(f"{max(10, 4 * step)}s"):
        panels.setdefault(query.title, []).append(query)
    rows = math.ceil(len(panels) / COLUMNS)
    style = {"svg.fonttype": "none", "svg.hashsalt": "dsc-serve", "font.size": 8, "font.sans-serif": ["DejaVu Sans"]}
    matplotlib.rcParams.update(style)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 2.1 * rows), layout="constrained")
    for plot, (title, own) in zip(axes.flat, panels.items(), strict=False):
        for query in own:
            for series in ask(url, "query_range", query=query.expr, start=end - seconds, end=end, step=step):
                name = re.sub(r"\{\{(\w+)\}\}", lambda label, s=series: s["metric"].get(label[1], ""), query.legend)
                times, values = zip(*series["values"], strict=True)
                plot.plot([at - end + seconds for at in times], [float(v) for v in values], label=name, linewidth=1)
        plot.set_title(title, loc="left", fontweight="bold")
        plot.set_ylim(bottom=0)
        if own[0].unit in FORMATS:
            plot.yaxis.set_major_formatter(FORMATS[own[0].unit])
        plot.locator_params(nbins=4)
        if any(query.legend for query in own):
            plot.legend(fontsize=6, loc="upper left", framealpha=0.6)
    for plot in axes.flat[len(panels) :]:
        plot.remove()
    figure.supxlabel("seconds")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    draw(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
