"""More load than a server can bear: what it still completes, how soon, and how it refuses the rest."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from dsc_serve.bench.load.generator import LoadConfig, LoadError, run_load
from dsc_serve.bench.load.summary import LoadResult

REFUSAL = "HTTP 429"


@dataclass(frozen=True)
class Overload:
    """Three loads on one server: at its peak, with all its places taken, and at `factor` times what it completes."""

    factor: float
    peak: LoadResult
    full: LoadResult
    overload: LoadResult

    @property
    def goodput_ratio(self) -> float:
        """Tokens per second of completed requests, to those at the peak."""
        return self.overload.output_throughput / self.peak.output_throughput

    @property
    def ttft_ratio(self) -> float:
        """The 99th percentile of the admitted requests' time to the first token, to that of a full house."""
        return (self.overload.ttft.p99 or 0.0) / (self.full.ttft.p99 or 1.0)

    @property
    def lost(self) -> int:
        """Requests at overload that neither succeeded nor were refused."""
        return self.overload.failed - self.overload.failures.get(REFUSAL, 0)


def run_overload(load: LoadConfig, places: int, factor: float) -> Overload:
    """Measure the three loads one after the other; `places` is how many generations the server holds.

    Raises LoadError when the server completes nothing at its peak.
    """
    peak = run_load(msgspec.structs.replace(load, arrivals="closed"))
    if not peak.completed:
        raise LoadError(f"{load.url} completed none of {peak.failed} requests: {peak.failure_examples}")
    full = run_load(msgspec.structs.replace(load, concurrency=places))
    rate = peak.request_throughput * factor
    overload = run_load(msgspec.structs.replace(load, arrivals="poisson", request_rate=rate, warmup=0))
    return Overload(factor, peak, full, overload)


def format_overload(result: Overload) -> str:
    """The figures for people."""
    columns = ("requests/s", "completed", "refused", "lost", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "429 p99 ms")
    lines = ["".join(f"{name:>13}" for name in ("", *columns))]
    for name, load in (("peak", result.peak), ("full house", result.full), ("overload", result.overload)):
        refused = load.failures.get(REFUSAL, 0)
        offered = (load.completed + load.failed) / load.duration if load.request_rate is None else load.request_rate
        cells = (offered, load.completed, refused, load.failed - refused, load.output_throughput)
        times = (load.ttft.median, load.ttft.p99, load.refused.p99)
        shown = [f"{value:.1f}" if isinstance(value, float) else f"{value}" for value in (*cells, *times)]
        lines.append("".join(f"{cell:>13}" for cell in (name, *(cell.replace("None", "-") for cell in shown))))
    lines += [
        "",
        f"goodput at {result.factor:g} times what it can complete: {result.goodput_ratio:.2f} of the peak's",
        f"TTFT p99 of the admitted: {result.ttft_ratio:.2f} times that of a full house",
        f"client: {result.overload.client['client_cpu']} of a core",
    ]
    return "\n".join(lines)
