"""The figures of an overloaded server."""

from __future__ import annotations

import pytest

from dsc_serve.bench.load.exchange import RequestOutcome
from dsc_serve.bench.load.overload import Overload, format_overload
from dsc_serve.bench.load.summary import LoadResult, summarize


def result(outcomes: list[RequestOutcome], rate: float | None = None) -> LoadResult:
    return summarize(
        outcomes,
        2.0,
        date="",
        url="",
        model="",
        max_concurrency=None,
        request_rate=rate,
        config={},
        client={"client_cpu": 0.1},
    )


def good(ttft: float) -> RequestOutcome:
    return RequestOutcome(ttft=ttft, latency=ttft + 1, output_tokens=10)


def test_the_ratios_are_those_of_what_was_measured() -> None:
    refused = RequestOutcome(failure="HTTP 429", detail="full", latency=0.004)
    overload = result([*[good(0.3)] * 9, *[refused] * 80, RequestOutcome(failure="timeout")], rate=50.0)
    measured = Overload(10, result([good(0.1)] * 10), result([good(0.2)] * 10), overload)
    assert measured.goodput_ratio == pytest.approx(0.9)
    assert measured.ttft_ratio == pytest.approx(1.5)
    assert measured.lost == 1
    assert overload.refused.p99 == pytest.approx(4)
    text = format_overload(measured)
    assert "goodput at 10 times what it can complete: 0.90 of the peak's" in text
    assert text.splitlines()[3].split() == ["overload", "50.0", "9", "80", "1", "45.0", "300.0", "300.0", "4.0"]
