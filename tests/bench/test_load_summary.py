from __future__ import annotations

import json
import math

import pytest

from dsc_serve.bench.load.exchange import RequestOutcome
from dsc_serve.bench.load.summary import (
    LoadResult,
    Spread,
    format_table,
    parse_limits,
    record_line,
    spread,
    summarize,
)
from dsc_serve.config import ConfigError


def result(outcomes: list[RequestOutcome], duration: float = 2.0, limits: dict[str, float] | None = None) -> LoadResult:
    return summarize(
        outcomes,
        duration,
        limits=limits,
        date="2026-01-01T00:00:00+00:00",
        url="http://localhost:8000",
        model="m",
        max_concurrency=2,
        request_rate=None,
        config={"seed": 0},
        client={"cpu": "x"},
    )


def test_spread_is_in_milliseconds_and_interpolates() -> None:
    measured = spread([0.001, 0.002, 0.003, 0.004])
    assert measured.mean == pytest.approx(2.5)
    assert measured.median == pytest.approx(2.5)
    assert measured.p90 == pytest.approx(3.7)
    assert measured.p99 == pytest.approx(3.97)
    assert measured.std == pytest.approx(math.sqrt(1.25))
    assert spread([]) == Spread()
    assert spread([0.5]) == Spread(500, 500, 500, 500, 0)


def test_figures_are_those_of_the_definitions() -> None:
    fast = RequestOutcome(ttft=0.1, latency=0.5, gaps=(0.1, 0.3), input_tokens=10, output_tokens=5)
    slow = RequestOutcome(ttft=0.3, latency=0.9, gaps=(0.2, 0.2, 0.2), input_tokens=20, output_tokens=4)
    single = RequestOutcome(ttft=0.2, latency=0.2, input_tokens=30, output_tokens=1)
    failed = RequestOutcome(failure="HTTP 500", detail="first")
    again = RequestOutcome(failure="HTTP 500", detail="second")
    late = RequestOutcome(failure="timeout", detail="late")
    summary = result([fast, failed, slow, single, late, again])
    assert (summary.completed, summary.failed) == (3, 3)
    assert summary.failures == {"HTTP 500": 2, "timeout": 1}
    assert summary.failure_examples == {"HTTP 500": "first", "timeout": "late"}
    assert (summary.total_input_tokens, summary.total_output_tokens) == (60, 10)
    assert (summary.request_throughput, summary.output_throughput, summary.total_token_throughput) == (1.5, 5, 35)
    assert summary.ttft.mean == pytest.approx(200)
    assert summary.e2el.mean == pytest.approx(1600 / 3)
    assert summary.tpot.mean == pytest.approx((100 + 200) / 2)  # one token has no time per further token
    assert summary.itl.mean == pytest.approx(200)  # over the five gaps, not over requests
    assert summary.itl.median == pytest.approx(200)


def test_the_flat_form_has_the_names_that_tools_exchange() -> None:
    flat = result([RequestOutcome(ttft=0.1, latency=0.5, gaps=(0.4,), input_tokens=10, output_tokens=2)]).to_dict()
    kinds = ("ttft", "tpot", "itl", "e2el", "queue", "refused")
    names = {f"{name}_{of}_ms" for name in ("mean", "median", "p90", "p99", "std") for of in kinds}
    names |= {"request_throughput", "output_throughput", "total_token_throughput", "duration", "completed", "failed"}
    names |= {
        "failures",
        "total_input_tokens",
        "total_output_tokens",
        "max_concurrency",
        "request_rate",
        "request_goodput",
    }
    names |= {"date", "url", "model", "config", "client", "failure_examples", "uncounted"}
    assert set(flat) == names
    assert flat["mean_ttft_ms"] == pytest.approx(100) and flat["request_rate"] is None
    assert json.loads(json.dumps(flat)) == flat


def test_the_table_shows_what_was_not_measured_as_such() -> None:
    table = format_table(result([RequestOutcome(ttft=0.1, latency=0.1, output_tokens=1)]))
    lines = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert lines["time to first token"] == ["100.00"] * 4 + ["0.00"]
    assert lines["time per output token"] == ["-"] * 5
    assert lines["requests completed"] == ["1"]
    assert "failed:" not in table


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    limits = parse_limits(["ttft:100", "tpot:50"])
    both = RequestOutcome(ttft=0.1, latency=0.3, output_tokens=5)
    late = RequestOutcome(ttft=0.101, latency=0.2, output_tokens=5)
    slow = RequestOutcome(ttft=0.05, latency=0.3, output_tokens=5)
    single = RequestOutcome(ttft=0.1, latency=0.1, output_tokens=1)
    failed = RequestOutcome(failure="timeout")
    summary = result([both, late, slow, single, failed], limits=limits)
    assert summary.request_goodput == pytest.approx(2 / 2.0)
    assert "goodput" in format_table(summary)
    assert result([late], limits=limits).request_goodput == 0
    assert result([both]).request_goodput is None and "goodput" not in format_table(result([both]))


@pytest.mark.parametrize("text", ["ttft", "ttft:0", "itl:5", "tpot:nan", "e2el:inf", "ttft:fast"])
def test_limits_that_cannot_be_kept_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"goodput is '{text}'; it must be NAME:MILLISECONDS"):
        parse_limits([text])


def test_a_record_holds_every_time_of_its_request() -> None:
    outcome = RequestOutcome(
        due=7.5, queued=0.001, ttft=0.1, latency=0.5, gaps=(0.1, 0.3), input_tokens=9, output_tokens=3
    )
    line = record_line(outcome, begun=7.0)
    assert line.endswith(b"\n") and json.loads(line) == {
        "start_s": 0.5,
        "input_tokens": 9,
        "output_tokens": 3,
        "queue_ms": 1.0,
        "ttft_ms": 100.0,
        "e2el_ms": 500.0,
        "tpot_ms": 200.0,
        "itl_ms": [100.0, 300.0],
    }
    failed = json.loads(record_line(RequestOutcome(failure="timeout", detail="late"), begun=0.0))
    assert failed["failure"] == "timeout" and "ttft_ms" not in failed
