"""From measured requests to the figures that tools exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from dsc_serve.bench.load.exchange import RequestOutcome
from dsc_serve.config import ConfigError

MEASURES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
    "queue": "waiting in this client",
}
LIMITED = ("ttft", "tpot", "e2el")
FEW = 100  # requests, of fewer than which a 99th percentile is nearly the slowest
STATISTICS = ("mean", "median", "p90", "p99", "std")


class Spread(msgspec.Struct, frozen=True):
    """A distribution in milliseconds; all None where nothing was measured."""

    mean: float | None = None
    median: float | None = None
    p90: float | None = None
    p99: float | None = None
    std: float | None = None


def spread(seconds: Sequence[float]) -> Spread:
    """Percentiles interpolate linearly; std is that of the values themselves (divided by n)."""
    if not seconds:
        return Spread()
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    median, p90, p99 = np.percentile(values, (50, 90, 99))
    return Spread(float(values.mean()), float(median), float(p90), float(p99), float(values.std()))


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one load measured. Throughputs are per second over `duration`, of completed requests only."""

    date: str
    url: str
    model: str
    duration: float  # seconds
    completed: int
    failed: int
    failures: dict[str, int]  # failed requests by reason
    failure_examples: dict[str, str]  # one of each, quoted
    uncounted: int  # completed requests whose tokens the server did not count, so that events stand for them
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    max_concurrency: int | None
    request_rate: float | None
    request_goodput: float | None  # completed requests that kept all limits, per second; None where there are no limits
    ttft: Spread  # over requests, as tpot and e2el
    tpot: Spread  # (latency − ttft) / (output tokens − 1), of requests with at least two tokens
    itl: Spread  # over all gaps between events with tokens
    e2el: Spread
    queue: Spread  # from when a request was due to when it was sent, which the other times contain
    config: dict[str, object]
    client: dict[str, object]  # the machine; client_cpu: share of one core that this client itself used
    refused: Spread = Spread()  # the latency of answers with status 429

    def to_dict(self) -> dict[str, object]:
        """Flat, with spreads as mean_ttft_ms, p99_itl_ms and so on; ready for JSON."""
        flat: dict[str, object] = {}
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, Spread):
                flat.update({f"{name}_{field}_ms": getattr(value, name) for name in STATISTICS})
            else:
                flat[field] = value
        return flat


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """Limits in seconds from texts such as "ttft:100", in milliseconds. Raises ConfigError."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limits[name] = float(value) / 1e3
        except ValueError:
            limits[name] = 0.0
        if name not in LIMITED or not 0 < limits[name] < float("inf"):
            allowed = ", ".join(LIMITED)
            raise ConfigError(f"goodput is {text!r}; it must be NAME:MILLISECONDS with a name of {allowed}")
    return limits


def keeps(outcome: RequestOutcome, limits: Mapping[str, float]) -> bool:
    """Whether a completed request's times are all within their limits; a single token has no time per token."""
    times = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return all(times[name] <= limit for name, limit in limits.items())


def summarize(
    outcomes: Iterable[RequestOutcome],
    duration: float,
    *,
    date: str,
    url: str,
    model: str,
    max_concurrency: int | None,
    request_rate: float | None,
    config: dict[str, object],
    client: dict[str, object],
    limits: Mapping[str, float] | None = None,
) -> LoadResult:
    """The result of a load that took `duration` seconds from its first request's start to its last one's end."""
    outcomes = list(outcomes)
    good = [outcome for outcome in outcomes if outcome.failure is None]
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
    examples: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            examples.setdefault(outcome.failure, outcome.detail)
    inputs = sum(outcome.input_tokens for outcome in good)
    outputs = sum(outcome.output_tokens for outcome in good)
    per_second = 1 / duration if duration > 0 else 0.0
    return LoadResult(
        date=date,
        url=url,
        model=model,
        duration=duration,
        completed=len(good),
        failed=len(outcomes) - len(good),
        failures=dict(failures.most_common()),
        failure_examples=examples,
        uncounted=sum(not outcome.counted for outcome in good),
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=len(good) * per_second,
        output_throughput=outputs * per_second,
        total_token_throughput=(inputs + outputs) * per_second,
        max_concurrency=max_concurrency,
        request_rate=request_rate,
        request_goodput=sum(keeps(outcome, limits) for outcome in good) * per_second if limits else None,
        ttft=spread([outcome.ttft for outcome in good]),
        tpot=spread([outcome.tpot for outcome in good if outcome.tpot is not None]),
        itl=spread([gap for outcome in good for gap in outcome.gaps]),
        e2el=spread([outcome.latency for outcome in good]),
        queue=spread([outcome.queued for outcome in good]),
        config=config,
        client=client,
        refused=spread([outcome.latency for outcome in outcomes if outcome.failure == "HTTP 429"]),
    )


def record_line(outcome: RequestOutcome, begun: float) -> bytes:
    """One measured request as a line of JSON; start_s: when it was due, in seconds after `begun`; itl_ms: all gaps."""
    record: dict[str, object] = {
        "start_s": round(outcome.due - begun, 6),
        "input_tokens": outcome.input_tokens,
        "output_tokens": outcome.output_tokens,
        "queue_ms": milliseconds(outcome.queued),
    }
    if outcome.failure is None:
        record |= {"ttft_ms": milliseconds(outcome.ttft), "e2el_ms": milliseconds(outcome.latency)}
        record |= {"tpot_ms": None if outcome.tpot is None else milliseconds(outcome.tpot)}
        record |= {"itl_ms": [milliseconds(gap) for gap in outcome.gaps]}
    else:
        record |= {"failure": outcome.failure, "detail": outcome.detail}
    return msgspec.json.encode(record) + b"\n"


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def format_table(result: LoadResult) -> str:
    """The result for people."""
    rows = [
        ("requests completed", f"{result.completed}"),
        ("requests failed", f"{result.failed}"),
        ("concurrency", "open" if result.max_concurrency is None else f"{result.max_concurrency}"),
        ("duration", f"{result.duration:.2f} s"),
        ("input tokens", f"{result.total_input_tokens}"),
        ("output tokens", f"{result.total_output_tokens}"),
        ("request throughput", f"{result.request_throughput:.2f} req/s"),
        ("output throughput", f"{result.output_throughput:.1f} tok/s"),
        ("total token throughput", f"{result.total_token_throughput:.1f} tok/s"),
    ]
    if result.request_goodput is not None:
        rows.append(("goodput", f"{result.request_goodput:.2f} req/s"))
    lines = [f"{result.model} at {result.url}", "", *(f"{name:<24}{value:>16}" for name, value in rows), ""]
    lines.append(f"{'milliseconds':<24}" + "".join(f"{name:>10}" for name in STATISTICS))
    for field, title in MEASURES.items():
        values = [getattr(getattr(result, field), name) for name in STATISTICS]
        cells = "".join(f"{'-' if value is None else format(value, '.2f'):>10}" for value in values)
        lines.append(f"{title:<24}{cells}")
    if 0 < result.completed < FEW:
        lines += ["", f"The p99 of {result.completed} requests is nearly the slowest of them (itl: of all gaps)."]
    if result.failed:
        lines.append("")
        lines += ["Every request failed:" if not result.completed else "Failed requests:"]
        lines += [
            f"  {count} × {reason}: {result.failure_examples[reason]}" for reason, count in result.failures.items()
        ]
    if not result.completed and not result.failed:
        lines += ["", "No request was sent."]
    if result.uncounted:
        lines += ["", f"{result.uncounted} answers had no usage; their events were counted as tokens."]
    return "\n".join(lines)
