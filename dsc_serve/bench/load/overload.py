"""More load than a server can bear: what it still completes, how soon, and how it refuses the rest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec

from dsc_serve.bench.load.generator import LoadConfig, LoadError, run_load
from dsc_serve.bench.load.summary import LoadResult

REFUSAL = "HTTP 429"
LOADS = {"peak": "peak", "full": "full house", "overload": "overload"}


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One load of a round. Times in milliseconds, None where no request had one."""

    offered: float  # requests per second
    completed: int
    refused: int
    lost: int  # neither completed nor refused
    output_throughput: float
    median_ttft_ms: float | None
    p99_ttft_ms: float | None
    p99_refused_ms: float | None
    client_cpu: float

    @classmethod
    def of(cls, load: LoadResult) -> LoadFigures:
        refused = load.failures.get(REFUSAL, 0)
        offered = (load.completed + load.failed) / load.duration if load.request_rate is None else load.request_rate
        return cls(
            offered=offered,
            completed=load.completed,
            refused=refused,
            lost=load.failed - refused,
            output_throughput=load.output_throughput,
            median_ttft_ms=load.ttft.median,
            p99_ttft_ms=load.ttft.p99,
            p99_refused_ms=load.refused.p99,
            client_cpu=float(str(load.client["client_cpu"])),
        )


class OverloadRound(msgspec.Struct, frozen=True, kw_only=True):
    """Three loads on one server: at its peak, with all slots taken, and at a multiple of what it completes."""

    peak: LoadFigures
    full: LoadFigures
    overload: LoadFigures

    @property
    def goodput_ratio(self) -> float:
        """Tokens per second of completed requests, to those at the peak."""
        return self.overload.output_throughput / self.peak.output_throughput

    @property
    def ttft_ratio(self) -> float:
        """The 99th percentile of the admitted requests' time to the first token, to that of a full house."""
        return (self.overload.p99_ttft_ms or 0.0) / (self.full.p99_ttft_ms or 1.0)


def run_overload(
    load: LoadConfig, slots: int, factor: float, rounds: int, report: Callable[[str], None] = lambda line: None
) -> list[OverloadRound]:
    """Measure the three loads one after the other, round by round; `slots` is how many generations the server holds.

    Raises LoadError when the server completes nothing at its peak.
    """
    found = []
    for number in range(rounds):
        report(f"round {number + 1} of {rounds}")
        own = msgspec.structs.replace(load, seed=load.seed + number)
        peak = run_load(msgspec.structs.replace(own, arrivals="closed"))
        if not peak.completed:
            raise LoadError(f"{load.url} completed none of {peak.failed} requests: {peak.failure_examples}")
        full = run_load(msgspec.structs.replace(own, concurrency=slots))
        rate = peak.request_throughput * factor
        overload = run_load(msgspec.structs.replace(own, arrivals="poisson", request_rate=rate, warmup=0))
        three = {"peak": peak, "full": full, "overload": overload}
        found.append(OverloadRound(**{name: LoadFigures.of(result) for name, result in three.items()}))
    return found


def format_overload(found: Sequence[OverloadRound], factor: float) -> str:
    """Medians over rounds in Markdown, and the ratios that overload is judged by, with those of all rounds."""
    columns = ("requests/s", "completed", "refused", "lost", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "429 p99 ms")
    lines = [f"| load | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    fields = [name for name in LoadFigures.__struct_fields__ if name != "client_cpu"]
    for name, title in LOADS.items():
        own = [getattr(one, name) for one in found]
        cells = [shown([getattr(load, field) for load in own]) for field in fields]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    ratios = {
        f"Goodput at {factor:g} times what it can complete, to the peak's": [one.goodput_ratio for one in found],
        "TTFT p99 of the admitted, to that of a full house": [one.ttft_ratio for one in found],
        "Cores that the client used at overload": [one.overload.client_cpu for one in found],
    }
    lines += ["", f"| medians of rounds | {len(found)} | lowest, highest |", "|---|---|---|"]
    for title, values in ratios.items():
        lines.append(f"| {title} | {statistics.median(values):.2f} | {min(values):.2f}, {max(values):.2f} |")
    return "\n".join(lines)


def shown(values: Sequence[float | None]) -> str:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    median = statistics.median(known)
    return f"{median:g}" if all(isinstance(value, int) for value in known) else f"{median:.1f}"
