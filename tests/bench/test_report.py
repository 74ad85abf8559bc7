"""The report's first screen answers; its charts say what they show; and what rounds do not bear out is no finding."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from xml.etree import ElementTree

import pytest

from dsc_serve.bench.compare.elements import Chart, Heading, Paragraph, Table, html_element
from dsc_serve.bench.compare.findings import answer
from dsc_serve.bench.compare.prompt_steps import share_between, step_counts
from dsc_serve.bench.compare.report import CHARTS, FIRST, elements, html_page, markdown
from dsc_serve.bench.compare.results import Results
from dsc_serve.bench.plot import even_ticks

from .test_findings import results

SVG = "{http://www.w3.org/2000/svg}"


def told() -> Results:
    """dsc wins at 8 streams, loses at 1, and rounds disagree at 16."""
    return results({1: [11.0, 12.0, 11.0], 8: [8.0, 8.0, 8.5], 16: [9.0, 11.0, 10.0]})


def test_the_first_screen_is_three_sentences_and_one_chart() -> None:
    first = elements(told())[:5]
    assert [type(element) for element in first] == [Paragraph, Paragraph, Paragraph, Chart, Heading]
    page = html_page(told())
    before = page[: page.index("<h2>")]
    assert before.count("<p>") == 3 and before.count("<svg") == 1 and "<table" not in before
    assert "times those of moe" in before and page.count("<svg") == 1 + len(CHARTS)
    assert page.index("</svg>") < page.index("<table") and page.rindex("<svg") < page.index("<h2>Where a step")
    closed = page[page.index("<h2>Closed loops") : page.index("<h2>Open loads")]
    assert closed.rindex("<svg") < closed.index("<table"), "charts stand before tables"
    text = markdown(told(), "plots/own", ["to-baseline", "throughput"])
    assert text.index("](plots/own-to-baseline.svg)") < text.index("### What was found") < text.index("![Throughput]")


def test_the_answer_says_where_it_wins_where_it_loses_and_where_neither() -> None:
    rate, times, worth = answer(told())
    parts = "more at 8 streams (1.25 times); fewer at 1 stream (0.91 times); no difference at 16 streams."
    assert rate == f"dsc beside moe, tokens per second: {parts}"
    between = "shorter at 8 streams (0.80 times); longer at 1 stream (1.10 times); no difference at 16 streams"
    assert times == (
        f"Its median time between tokens is {between}; its 99th percentile of the time to the first token is {between}."
    )
    assert worth == (
        "Medians of 3 rounds, told as a difference only where all rounds agree and the median is 2 % from 1 "
        "(a cpu, 2 threads; the most tokens per second: dsc, 100 at 16 streams)."
    )
    assert "by a single round at 1 stream (2.00 times)" in answer(results({1: [5.0]}))[0]
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
    first, *charts = [element for element in elements(told()) if isinstance(element, Chart)]
    assert first.name == FIRST and [chart.name for chart in charts] == list(CHARTS)
    for chart in charts:
        texts = [node.text or "" for node in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]
        assert {"dsc", "moe (baseline)"} <= set(texts), "a legend"
        assert any("medians of 3 rounds; baseline: moe" in text for text in texts)
        assert any(text.startswith(("more is better", "less is better")) for text in texts)
        assert any("streams at once" in text or "as a multiple of the peak of moe" in text for text in texts)
        assert any(unit in text for unit in units for text in texts), chart.name
    directions = {chart.name: "more is better" in chart.svg for chart in charts}
    assert {name for name, more in directions.items() if more} == {"throughput", "goodput"}


def test_the_first_chart_shows_ratios_their_range_and_which_are_differences() -> None:
    first = next(element for element in elements(told()) if isinstance(element, Chart))
    root = ElementTree.fromstring(first.svg)
    texts = [node.text or "" for node in root.iter(f"{SVG}text")]
    assert {"dsc", "moe (baseline) = 1", "1", "8", "16", "streams at once"} <= set(texts)
    assert "times the baseline's tokens per second" in texts
    assert "more is better; median and range of 3 rounds; an empty mark is no difference" in texts
    marks = list(root.iter(f"{SVG}circle"))
    assert [mark.get("fill") == "#ffffff" for mark in marks[:3]] == [False, False, True]
    heights = [float(mark.get("cy") or 0) for mark in marks[:3]]
    assert heights[1] < heights[2] < heights[0], "1.25 above 1.00 above 0.91"
    lines = next(element for element in elements(told()) if isinstance(element, Chart) and element.name == "throughput")
    named = ElementTree.fromstring(lines.svg).findall(f"{SVG}circle")
    assert marks[0].get("stroke") == named[0].get("fill"), "a system has its colour in all charts"
    even = next(element for element in elements(results({1: [9.9, 10.1], 8: [9.9, 9.9]})) if isinstance(element, Chart))
    assert even.svg.count('fill="#ffffff"') == 1 + 2, "the ground, and two that are none"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.91, 1.25, [0.9, 1.0, 1.1, 1.2, 1.3]),
        (1.0, 4.6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        (1.0, 1.0, [1.0, 1.02]),
        (0.25, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_of_ratios_are_round_and_begin_at_nothing_where_these_are_far_apart(
    low: float, high: float, ticks: list[float]
) -> None:
    assert even_ticks(low, high) == ticks


def test_a_printed_report_is_light_and_cuts_no_chart_or_row() -> None:
    style = html_page(told()).partition("<style>")[2].partition("</style>")[0]
    printed = style.partition("@media print")[2]
    assert "color-scheme: light" in style and "size: A4" in printed
    assert (
        ".chart, tr, li { break-inside: avoid }" in printed and "h2, caption, thead { break-after: avoid }" in printed
    )
    page = html_page(told())
    assert page.count('<div class="chart">') == page.count("<svg") and '<table class="short">' in page


def test_words_in_tables_stand_left_and_figures_right() -> None:
    rows = [("a / b", "median time", "no difference", ""), ("c", "99th percentile of it", "no difference (-1%)", "")]
    made = html_element(Table("T", ("who", "what", "ratio", "nothing"), rows))
    assert made.count('class="words"') == 2 * 3 and '<td class="words">median time</td><td>no difference</td>' in made


def table(made: Results, title: str) -> Table:
    return next(element for element in elements(made) if isinstance(element, Table) and element.title.startswith(title))


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
    assert not [
        element for element in elements(made) if isinstance(element, Table) and "part of a prompt" in element.title
    ]
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
