"""The figures of an overloaded server."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_serve.bench.load import overload
from dsc_serve.bench.load.exchange import RequestOutcome
from dsc_serve.bench.load.generator import LoadConfig
from dsc_serve.bench.load.overload import LoadFigures, OverloadRound, format_overload
from dsc_serve.bench.load.summary import LoadResult, summarize
from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.cli import main


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


def rounds() -> list[OverloadRound]:
    refused = RequestOutcome(failure="HTTP 429", detail="full", latency=0.004)
    crowded = result([*[good(0.3)] * 9, *[refused] * 80, RequestOutcome(failure="timeout")], rate=50.0)
    more = result([*[good(0.2)] * 11, *[refused] * 79], rate=60.0)
    calm = LoadFigures.of(result([good(0.1)] * 10)), LoadFigures.of(result([good(0.2)] * 10))
    return [OverloadRound(peak=calm[0], full=calm[1], overload=LoadFigures.of(own)) for own in (crowded, more, crowded)]


def test_the_ratios_are_those_of_what_was_measured() -> None:
    first, second, _ = rounds()
    assert first.goodput_ratio == pytest.approx(0.9) and second.goodput_ratio == pytest.approx(1.1)
    assert first.ttft_ratio == pytest.approx(1.5)
    assert first.overload.lost == 1 and second.overload.lost == 0
    assert first.overload.p99_refused_ms == pytest.approx(4)
    text = format_overload(rounds(), 10)
    assert "| Goodput at 10 times what it can complete, to the peak's | 0.90 | 0.90, 1.10 |" in text
    assert "| medians of rounds | 3 | lowest, highest |" in text
    assert "| overload | 50.0 | 9 | 80 | 1 | 45.0 | 300.0 | 300.0 | 4.0 |" in text.splitlines()
    assert "| peak | 5.0 | 10 | 0 | 0 | 50.0 | 100.0 | 100.0 | – |" in text.splitlines()


def test_rounds_are_kept_and_the_key_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = list[LoadConfig]()

    def measured(load: LoadConfig) -> LoadResult:
        seen.append(load)
        return result([good(0.1)] * 10, rate=load.request_rate if load.arrivals == "poisson" else None)

    monkeypatch.setattr(overload, "run_load", measured)
    file = tmp_path / "overload.json"
    words = ["bench", "overload", "http://127.0.0.1:1", "--api-key", "k-123", "--rounds", "2", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["dsc-serve", *words])
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert [load.arrivals for load in seen] == ["closed", "closed", "poisson"] * 2
    assert len({load.seed for load in seen}) == 2 and all(load.api_key == "k-123" for load in seen)
    text = file.read_text(encoding="utf-8")
    assert "k-123" not in text and str(tmp_path) not in text
    kept = load_kept(file)
    assert kept["command"] == "dsc-serve bench overload http://127.0.0.1:1 --rounds 2 --json overload.json"
    assert "| overload | 50.0 | 10 |" in markdown_of_kept(kept)
