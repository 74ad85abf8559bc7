"""The report's first screen answers; its charts say what they show; and what rounds do not bear out is no finding."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from xml.etree import ElementTree

import pytest

from dsc_serve.bench.compare.blocks import Chart, Heading, Paragraph, Table
from dsc_serve.bench.compare.findings import answer
from dsc_serve.bench.compare.prompt_steps import share_between, step_counts
from dsc_serve.bench.compare.report import CHARTS, elements, html_page, markdown
from dsc_serve.bench.compare.results import Results

from .test_findings import results

SVG = "{http://www.w3.org/2000/svg}"


def told() -> Results:
    """dsc wins at 8 streams, loses at 1, and rounds disagree at 16."""
    return results({1: [11.0, 12.0, 11.0], 8: [8.0, 8.0, 8.5], 16: [9.0, 11.0, 10.0]})


def test_the_first_screen_is_three_sentences_and_one_chart() -> None:
    first = elements(told())[:5]
    assert [type(block) for block in first] == [Paragraph, Paragraph, Paragraph, Chart, Heading]
    page = html_page(told())
    before = page[: page.index("<h2>")]
    assert before.count("<p>") == 3 and before.count("<svg") == 1 and "<table" not in before
    assert page.index("</svg>") < page.index("<table") and page.rindex("<svg") < page.index("<h2>Where a step")
    closed = page[page.index("<h2>Closed loops") : page.index("<h2>Open loads")]
    assert closed.rindex("<svg") < closed.index("<table"), "charts stand before tables"
    assert markdown(told(), "plots/own", ["throughput"]).index("![Throughput]") < 1500


def test_the_answer_says_where_it_wins_where_it_loses_and_where_neither() -> None:
    rate, times, worth = answer(told())
    assert rate == ("Tokens per second, dsc to moe: wins 1.25 at 8, loses 0.91 at 1, no difference at 16 streams.")
    assert times.startswith("Times, dsc to moe: median time between tokens wins 0.80 at 8, loses 1.10 at 1, no")
    assert "99th percentile of the time to the first token wins 0.80 at 8" in times
    assert (
        worth
        == (
            'Medians of 3 rounds; a system "wins" where all agree, and a ratio whose rounds disagree is no finding '
            "(a cpu, 2 threads; the most tokens per second at 16 streams: dsc, 100).'"[:-1]
        )
    )
    assert "by one round 2.00 at 1 streams" in answer(results({1: [5.0]}))[0]
    assert "cannot tell a difference from chance" in answer(results({1: [5.0]}))[2]


def test_a_report_without_one_of_the_two_says_so_and_is_whole() -> None:
    made = told()
    made.rows = [row for row in made.rows if row.system != "moe"]
    assert answer(made) == ["moe had no load, so that dsc and moe cannot be compared."]
    assert html_page(made).count("<svg") == len(CHARTS)
    made.rows = []
    assert "dsc and moe had no load" in html_page(made)


def test_every_chart_has_units_a_legend_and_the_named_baseline() -> None:
    units = ("per second", "milliseconds", "second within")
    charts = [block for block in elements(told()) if isinstance(block, Chart)]
    assert [chart.name for chart in charts] == list(CHARTS)
    for chart in charts:
        texts = [node.text or "" for node in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]
        assert {"dsc", "moe (baseline)"} <= set(texts), "a legend"
        assert any("medians of 3 rounds; baseline: moe" in text for text in texts)
        assert any(text.startswith(("more is better", "less is better")) for text in texts)
        assert any("streams at once" in text or "as a multiple of the peak of moe" in text for text in texts)
        assert any(unit in text for unit in units for text in texts), chart.name
    directions = {chart.name: "more is better" in chart.svg for chart in charts}
    assert {name for name, more in directions.items() if more} == {"throughput", "goodput"}


def table(made: Results, title: str) -> Table:
    return next(block for block in elements(made) if isinstance(block, Table) and block.title.startswith(title))


def test_a_ratio_that_jumps_between_rounds_is_no_finding() -> None:
    made = told()
    rows = {row[0]: row[1:] for row in table(made, "Output tokens per second, to those of moe").rows}
    assert rows["dsc"] == ("0.91", "1.25", "no difference") and rows["moe"] == ("1.00", "1.00", "1.00")
    apart = table(made, "How far from equal").rows
    assert [row[-1] for row in apart[:2]] == ["no difference (-10% to +10%)", "no difference (-9% to +11%)"]
    assert all(cell.endswith(" *") for row in apart[:2] for cell in row[2:4])
    near = results({1: [9.9, 9.85, 9.9]})
    assert table(near, "Median time between tokens, to that").rows[0][1] == "no difference"


def test_the_time_between_tokens_is_told_as_a_distribution() -> None:
    made = told()
    for row in made.rows:
        row.figures |= {"median_itl_ms": 3.0, "p90_itl_ms": 9.5, "p99_itl_ms": 12.0}
    assert table(made, "Time between tokens, ms (p50, p90, p99)").rows[0][1] == "3.00, 9.50, 12.0"
    assert not [block for block in elements(made) if isinstance(block, Table) and "part of a prompt" in block.title]
    for row in made.rows:
        if row.system == "dsc":
            row.figures["prompt_steps"] = 0.25
    assert table(made, "Steps that computed a part of a prompt").rows == [("dsc", "25%", "25%", "25%")]


class Telling(BaseHTTPRequestHandler):
    """A server that tells its steps, but for the path that says otherwise."""

    body = b"# TYPE x counter\ndsc_serve_engine_steps_total 140.0\ndsc_serve_engine_prompt_steps_total 20.0\n"

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.send_header("Content-Length", f"{len(self.body)}")
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_steps_with_a_prompt_are_counted_from_what_the_server_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_between((100.0, 10.0), (140.0, 20.0)) == 0.25
    assert share_between((100.0, 10.0), (100.0, 10.0)) is share_between(None, (1.0, 1.0)) is None
    with HTTPServer(("127.0.0.1", 0), Telling) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert step_counts(url) == (140.0, 20.0)
            monkeypatch.setattr(Telling, "body", b"another server's metrics 1\n")
            assert step_counts(url) is None
        finally:
            server.shutdown()
            thread.join()
    assert step_counts(url) is None, "it has ended"
