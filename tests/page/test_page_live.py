"""The live view: right figures, and no question while nobody looks."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.browsing import KEY, OpenTab, Serve, Visit
from support.fake_engine import FakeEngine
from support.running_server import RunningServer, cpu_seconds

from dsc_serve.server import page

pytestmark = pytest.mark.full

LIVE = Path(page.__file__).parent / "live.js"
SCRAPES = """
# HELP dsc_serve_generated_tokens_total x
dsc_serve_generated_tokens_total{replica="a"} %d
dsc_serve_generated_tokens_total{replica="b"} %d
dsc_serve_time_to_first_token_seconds_bucket{le="0.1"} %d
dsc_serve_time_to_first_token_seconds_bucket{le="0.5"} %d
dsc_serve_time_to_first_token_seconds_bucket{le="+Inf"} %d
dsc_serve_requests_running 3 1700000000000
dsc_serve_engine_info{kernels="a \\"b\\", c} d",version="1"} 1
go_goroutines 7
"""


def scrapes(visit: Visit) -> int:
    return sum(address.endswith("/metrics") for address in visit.asked)


def pause(visit: Visit, seconds: float) -> None:
    """The browser goes on meanwhile."""
    visit.page.wait_for_timeout(1000 * seconds)


def test_a_server_is_asked_while_somebody_looks_and_only_then(tab: OpenTab, scripted: Serve) -> None:
    visit = tab(scripted(FakeEngine()))
    pause(visit, 3)
    assert scrapes(visit) == 0 and len([x for x in visit.asked if "/page/" not in x]) == 2, "the page and the models"
    visit.page.click("#tab-live")
    pause(visit, 4.5)
    assert 2 <= scrapes(visit) <= 4, "every two seconds"
    visit.page.click("#tab-chat")
    before = scrapes(visit)
    pause(visit, 3)
    assert scrapes(visit) == before
    hide = """(state) => {
        Object.defineProperty(document, 'visibilityState', { get: () => state, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    visit.run(hide, "hidden")
    visit.page.click("#tab-live")
    pause(visit, 2.5)
    assert scrapes(visit) == before, "the view is chosen, and in a tab that is not shown"
    visit.run(hide, "visible")
    pause(visit, 2.5)
    assert scrapes(visit) >= before + 2
    visit.run(hide, "hidden")
    before = scrapes(visit)
    pause(visit, 3)
    assert scrapes(visit) == before


def test_the_charts_show_what_the_server_does(tab: OpenTab, tiny: RunningServer) -> None:
    visit = tab(tiny.url)
    visit.page.click("#tab-live")
    pause(visit, 0.5)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            tiny.post("/v1/completions", prompt="Once upon a time " * 8, max_tokens=60, ignore_eos=True)

    threads = [threading.Thread(target=load) for _ in range(3)]
    before, started = tiny.metric("dsc_serve_generated_tokens_total"), time.monotonic()
    for thread in threads:
        thread.start()
    try:
        pause(visit, 10)
        rate = (tiny.metric("dsc_serve_generated_tokens_total") - before) / (time.monotonic() - started)
        labels = visit.run("[...document.querySelectorAll('figure:not([hidden]) svg')].map(one => one.ariaLabel)")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    told = {label.split(":")[0]: label.split(": ", 1)[1] for label in labels}
    assert {"Tokens a second", "Time to first token", "Time between tokens", "Generations", "KV pool"} <= told.keys()
    assert "Atoms nobody picked of late" in told and "Prompt tokens found in the cache" in told
    highest = float(told["Tokens a second"].rsplit(" ", 1)[1].replace(",", ""))
    assert rate / 3 < highest < rate * 12, "prompts count too"
    assert "running 3" in told["Generations"] or "running 2" in told["Generations"]
    assert "none" not in told["Time to first token"] and " ms" in told["Time between tokens"]
    paths = visit.run(
        "[...document.querySelectorAll('figure:not([hidden]) .line-0')].map(one => one.getAttribute('d'))"
    )
    assert sum(path.count("L") >= 2 for path in paths) >= 4
    assert "dsc-serve" in visit.page.inner_text("#live-note")


def test_a_chart_is_of_what_there_is(tab: OpenTab, scripted: Serve) -> None:
    """Counters that only some servers have; one that answers in between with an error leaves a gap and no more."""
    visit = tab(scripted(FakeEngine()), expected="503")
    looks: list[int] = []

    def answer(route: Any) -> None:
        looks.append(len(looks))
        if looks[-1] == 2:
            route.fulfill(status=503, content_type="application/json", body='{"error": {"message": "<b>busy</b>"}}')
            return
        text = f'dsc_serve_draft_tokens_total{{source="a"}} {8 * len(looks)}\n'
        text += f'dsc_serve_draft_accepted_tokens_total{{source="a"}} {6 * len(looks)}\n'
        route.fulfill(status=200, content_type="text/plain", body=text)

    visit.page.route("**/metrics", answer)
    visit.page.click("#tab-live")
    visit.page.wait_for_selector("#live-note:has-text('No metrics: <b>busy</b>')")
    titles = visit.run("[...document.querySelectorAll('figure:not([hidden]) h2')].map((one) => one.textContent)")
    assert titles == ["Drafts accepted"]
    label = visit.run("document.querySelector('figure:not([hidden]) svg').ariaLabel")
    assert label == "Drafts accepted: share 75 %; highest of the last minutes 75 %"
    visit.page.wait_for_selector("#live-note:has-text('looked at every 2 s')")


def test_metrics_that_need_a_key_are_asked_for_with_it(tab: OpenTab, scripted: Serve) -> None:
    visit = tab(scripted(FakeEngine(), keys=f"me:{KEY}", metrics_key=True), expected="401")
    visit.page.click("#tab-live")
    visit.page.wait_for_selector("#live-note:has-text('there is no API key')")
    visit.page.fill("#key", KEY)
    visit.page.press("#key", "Tab")
    visit.page.wait_for_selector("#live-note:has-text('looked at every 2 s')")


def test_a_look_takes_less_than_2_percent_of_a_core(tiny: RunningServer) -> None:
    """Processor time of both processes for a scrape, beside the two seconds between the looks of the page."""
    tiny.post("/v1/completions", prompt="Once", max_tokens=60)
    tiny.wait_until(tiny.idle)

    def spent() -> float:
        return cpu_seconds(tiny.pid) + cpu_seconds(tiny.engine_pid)

    looks = 150
    rests = []
    for ask in (lambda: None, lambda: tiny.get("/metrics").raise_for_status()):
        before, began = spent(), time.monotonic()
        for _ in range(looks):
            ask()
        time.sleep(max(0.0, 2.0 - (time.monotonic() - began)))
        rests.append((spent() - before, time.monotonic() - began))
    (idle, idle_s), (busy, busy_s) = rests
    each = (busy - idle * busy_s / idle_s) / looks
    print(f"a look takes {1e3 * each:.2f} ms of processor time")
    (period,) = re.findall(r"PERIOD_MS = (\d+)", LIVE.read_text(encoding="utf-8"))
    assert 0 < each < 0.02 * int(period) / 1000


@pytest.fixture
def modules(tab: OpenTab, scripted: Serve) -> Visit:
    visit = tab(scripted(FakeEngine()))
    visit.run("""async () => {
        const names = ['metrics', 'chart', 'request', 'snippets', 'api', 'generate', 'names', 'routing'];
        const read = names.map((name) => import(`${document.baseURI}page/${name}.js`));
        window.m = Object.assign({}, ...(await Promise.all(read)));
    }""")
    return visit


def test_rates_and_quantiles_are_those_of_prometheus(modules: Visit) -> None:
    """Counters that fall began anew; a series that was not there before tells of no increase."""
    modules.run(
        "([a, b]) => { window.a = m.parse(a); window.b = m.parse(b); }",
        [SCRAPES % (10, 90, 0, 4, 4), SCRAPES % (30, 5, 6, 10, 14)],
    )
    assert modules.run("m.increase(a, b, 'generated_tokens_total')") == 20 + 5
    assert modules.run("m.increase(a, b, 'nothing')") is None
    assert modules.run("m.increase(new Map(), b, 'generated_tokens_total')") is None
    assert modules.run("m.increase(a, b, 'generated_tokens_total', ({replica}) => replica === 'a')") == 20
    assert modules.run("m.sum(b, 'requests_running')") == 3 and modules.run("m.sum(b, 'nothing')") is None
    assert modules.run("[...b.get('engine_info').values()][0].labels") == {"kernels": 'a \\"b\\", c} d', "version": "1"}
    assert not modules.run("b.has('goroutines')")
    shares = [0.3, 0.6, 0.9, 1.0]
    found = modules.run("(shares) => m.quantiles(a, b, 'time_to_first_token_seconds', shares)", shares)
    assert found == pytest.approx([0.05, 0.1, 0.5, 0.5]), "6 up to 0.1, none between, 4 beyond 0.5"
    assert modules.run("m.quantiles(b, b, 'time_to_first_token_seconds', [0.5])") == [None]


def test_axes_end_at_round_numbers_and_lines_break_where_nothing_was_known(modules: Visit) -> None:
    ends = modules.run("[0, 0.03, 0.1, 1, 1.1, 4.9, 5, 51, 99, 1000].map(m.axisEnd)")
    assert ends == pytest.approx([1, 0.05, 0.1, 1, 2, 5, 5, 100, 100, 1000])
    points = [{"at": at, "value": value} for at, value in ((0, 0), (10, 5), (20, None), (30, 5), (90, 10))]
    path = modules.run("(points) => m.path(points, 0, 100, 10, 40)", points)
    assert path.count("M") == 3 and path.count("L") == 1
    assert path.startswith("M0.0 77.0") and "M270.0 3.0" in path


def test_events_may_be_cut_anywhere(modules: Visit) -> None:
    stream = 'data: {"a": "é\\n"}\n\n: comment\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
    read = """async ([stream, size]) => {
        async function* pieces() { for (let i = 0; i < stream.length; i += size) yield stream.slice(i, i + size); }
        const told = [];
        try {
            for await (const event of m.events(pieces())) told.push(event);
        } catch (error) { told.push(error.message); }
        return told;
    }"""
    for size in (1, 2, 3, 7, 1000):
        assert modules.run(read, [stream, size]) == [{"a": "é\n"}, {"b": 2}]
    assert modules.run(read, [stream[:-14], 5])[-1] == "the answer broke off before its end"
    assert modules.run(read, ['data: {"error": {"message": "bad"}}\n\n', 4]) == ["bad"]


def test_values_become_python_s_own(modules: Visit) -> None:
    value: Any = {"a": [True, False, None, 1.5, -2, "é\"'\\\n\x7f\u2028</script>"], "b": {"c" * 90: []}}
    written = modules.run("(value) => m.literal(value)", value)
    assert eval(written) == value
    lone = modules.run("m.literal('\\ud800')")
    assert eval(lone) == "\ud800"


def test_tool_calls_are_put_together_from_any_pieces(modules: Visit) -> None:
    pieces = [
        {"index": 1, "id": "b", "function": {"name": "two"}},
        {"index": 0, "id": "a", "function": {"name": "one", "arguments": "{"}},
        {"index": 0, "function": {"arguments": "}"}},
    ]
    calls = modules.run(
        "(pieces) => { const all = new m.ToolCalls(); pieces.forEach((one) => all.add([one])); return all.calls; }",
        pieces,
    )
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("a", "one", "{}"),
        ("b", "two", ""),
    ]


@pytest.mark.parametrize(
    ("model", "picks"),
    [
        ({"max_model_len": 1024, "picks": {"layers": [0] * 6, "per_token": 4}}, 4),
        ({"max_model_len": 1024, "picks": {"layers": [0] * 6, "per_token": 64}}, 16),
        ({"max_model_len": 8192, "picks": {"layers": [0] * 32, "per_token": 64}}, 4),
        ({"max_model_len": 131072, "picks": {"layers": [0] * 32, "per_token": 64}}, 1),
        ({"max_model_len": 1024, "dsc": None}, None),
        (None, None),
    ],
)
def test_no_more_picks_are_asked_for_than_are_told(modules: Visit, model: Any, picks: int | None) -> None:
    assert modules.run("(model) => m.picks(model)", model) == picks


def test_what_cannot_be_seen_of_a_token_is_shown(modules: Visit) -> None:
    given = ["", " ", "\n", " a\n", "bytes:\\xc3", "\t"]
    assert modules.run("(given) => given.map(m.visible)", given) == ["∅", "␣", "⏎", " a⏎", "\\xc3", "⇥"]
