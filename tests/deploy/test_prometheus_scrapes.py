"""A real Prometheus scrapes a real server under load: every query of the dashboard and every rule has its answer."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from dashboard import FILE, ROWS, dashboard
from picture import Query, draw, queries
from support.running_prometheus import RunningPrometheus, start_prometheus, stop_prometheus
from support.running_server import RunningServer, start_server, stop_server

LOAD_S = 25
STREAMS = 12
SYSTEM = "You are a careful librarian who answers in one short sentence. "
SCRAPE_LIMIT_S = 0.02


async def load(url: str, seconds: float) -> None:
    """Streams that share a prefix, prompts that share nothing, a client that leaves, a crowd that is too large."""
    rng = random.Random(0)
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def stream(number: int) -> None:
            while time.monotonic() < end:
                prompt = SYSTEM * 4 + f"Question {number} of {rng.random()}:"
                body = {"prompt": prompt, "max_tokens": rng.randint(8, 64), "seed": number, "stream": number % 2 == 0}
                await client.post("/v1/completions", json=body)

        async def read_long_prompts() -> None:
            while time.monotonic() < end:
                ids = [rng.randrange(4096) for _ in range(rng.choice((64, 900)))]
                await client.post("/v1/completions", json={"prompt": ids, "max_tokens": 2})

        async def leave() -> None:
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 500}
            while time.monotonic() < end:
                try:
                    await client.post("/v1/chat/completions", json=body, timeout=0.3)
                except httpx.ReadTimeout:
                    await asyncio.sleep(0.5)

        async def crowd() -> None:
            await asyncio.sleep(seconds / 2)
            body, seen = {"prompt": "Once", "max_tokens": 200}, set[int]()
            while time.monotonic() < end:  # long enough for scrapes to see the queue
                answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(60)))
                seen |= {answer.status_code for answer in answers}
            assert seen == {200, 429}

        await asyncio.gather(*map(stream, range(STREAMS)), read_long_prompts(), leave(), crowd())


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    sizes = ("--max-running", "16", "--max-waiting", "8", "--kv-tokens", "8192", "--router-precision", "int8-certified")
    running = start_server(*sizes)
    yield running
    assert stop_server(running) == 0


@pytest.fixture(scope="module")
def prometheus(
    deploy: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningPrometheus]:
    """After it has watched the server under load."""
    target = server.url.removeprefix("http://")
    running = start_prometheus(deploy / "prometheus", target, tmp_path_factory.mktemp("prometheus"))
    running.wait_until(lambda: running.query("dsc_serve_ready") == [1], 30)
    asyncio.run(load(server.url, LOAD_S))
    yield running
    stop_prometheus(running)


def test_the_dashboards_file_is_what_its_program_writes() -> None:
    assert FILE.read_text() == dashboard()
    assert len(queries("1m")) == sum(len(view.queries) for views in ROWS.values() for view in views) > 50


def test_probes_and_scrapes_do_not_count_as_requests() -> None:
    every = [query for views in ROWS.values() for view in views for query in view.queries.values()]
    asked = [q for q in every if "dsc_serve_requests_total" in q or "dsc_serve_request_duration_seconds" in q]
    assert asked and all('endpoint=~"/v1/(chat/)?completions"' in query for query in asked)


@pytest.mark.parametrize("query", queries(f"{LOAD_S}s"), ids=lambda query: f"{query.title}: {query.legend}")
def test_a_query_of_the_dashboard_has_an_answer(prometheus: RunningPrometheus, query: Query) -> None:
    values = prometheus.query(query.expr)
    assert values, query.expr
    assert all(math.isfinite(value) for value in values), (query.expr, values)


def test_the_load_shows_in_the_metrics(prometheus: RunningPrometheus) -> None:
    """What would be a queue, refusals, hits and so on: none of them may be flat."""
    for expr in (
        'increase(dsc_serve_requests_total{status="429"}[1m])',
        'increase(dsc_serve_requests_total{status="499"}[1m])',
        'increase(dsc_serve_generations_total{finish_reason="abort"}[1m])',
        'increase(dsc_serve_generations_total{finish_reason="length"}[1m])',
        "increase(dsc_serve_prefix_cached_tokens_total[1m])",
        "max_over_time(dsc_serve_requests_waiting[1m])",
        'max_over_time(dsc_serve_requests_waiting_by_reason{reason="running"}[1m])',
        "increase(dsc_serve_routing_rescored_rows_total[1m])",
        "increase(dsc_serve_routing_distinct_atoms_total[1m])",
        "increase(dsc_serve_routing_bank_bytes_total[1m])",
    ):
        assert max(prometheus.query(f"({expr}) or vector(0)")) > 0, expr


def test_rules_are_healthy_and_records_are_made(prometheus: RunningPrometheus, deploy: Path) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule["lastError"] for rule in rules if "lastError" in rule]
    groups = yaml.safe_load((deploy / "prometheus" / "recording.yml").read_text())["groups"]
    for record in [rule["record"] for group in groups for rule in group["rules"]]:
        assert prometheus.query(record), record


def test_a_scrape_is_short(prometheus: RunningPrometheus, server: RunningServer) -> None:
    """Under load it also waits for the step that is being computed."""
    (loaded,) = prometheus.query("quantile_over_time(0.5, scrape_duration_seconds[1m])")
    server.wait_until(server.idle, 60)
    times = []
    with httpx.Client(timeout=60) as client:
        for _ in range(20):
            began = time.perf_counter()
            assert client.get(f"{server.url}/metrics").status_code == 200
            times.append(time.perf_counter() - began)
    print(f"\nscrapes: under load {1e3 * loaded:.1f} ms, idle {1e3 * statistics.median(times):.1f} ms (medians)")
    assert min(times) < SCRAPE_LIMIT_S


def test_the_dashboard_is_drawn(prometheus: RunningPrometheus, tmp_path: Path) -> None:
    file = Path(os.environ.get("DASHBOARD_PICTURE", tmp_path / "dashboard.svg"))
    draw(prometheus.url, LOAD_S + 5, file)
    drawn = file.read_text()
    assert all(view.title in drawn for views in ROWS.values() for view in views)


def test_an_engine_that_is_stopped_sets_off_the_alert(prometheus: RunningPrometheus, server: RunningServer) -> None:
    assert "DscServeEngineSilent" not in prometheus.firing()
    engine = server.engine_pid
    os.kill(engine, signal.SIGSTOP)
    try:
        prometheus.wait_until(lambda: "DscServeEngineSilent" in prometheus.firing(), 25)
        prometheus.wait_until(lambda: prometheus.query("dsc_serve_ready") == [0], 15)
    finally:
        os.kill(engine, signal.SIGCONT)
    prometheus.wait_until(lambda: "DscServeEngineSilent" not in prometheus.firing(), 30)
    assert prometheus.query("dsc_serve_engine_restarts_total") == [0]
