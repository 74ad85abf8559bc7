"""GET /metrics: what was counted, and the engine's state at this moment."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence

from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message
from support.fake_engine import FakeEngine, counting, saying
from support.serving import MAX_RUNNING, MAX_WAITING, app_around, ask, chat, client_of, complete, service_of, until

from dsc_serve import __version__
from dsc_serve.engine.routing_report import LayerRouting, RoutingReport


def samples(text: str) -> dict[str, float]:
    """Every series by its name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def scrape(app: FastAPI) -> dict[str, float]:
    response = ask(app, "GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return samples(response.text)


def test_requests_are_counted_by_what_the_client_got(app: FastAPI) -> None:
    complete(app)
    complete(app, stream=True)
    complete(app, temperature=-1)
    chat(app)
    ask(app, "GET", "/nothing/here")
    ask(app, "GET", "/v1/models/fake")
    found = scrape(app)
    counts = {key: value for key, value in found.items() if key.startswith("dsc_serve_requests_total") and value}
    assert counts == {
        "dsc_serve_requests_total{endpoint=/v1/completions,status=200}": 2,
        "dsc_serve_requests_total{endpoint=/v1/completions,status=400}": 1,
        "dsc_serve_requests_total{endpoint=/v1/chat/completions,status=200}": 1,
        "dsc_serve_requests_total{endpoint=other,status=404}": 1,
        "dsc_serve_requests_total{endpoint=/v1/models/{id},status=200}": 1,
    }
    assert found["dsc_serve_request_duration_seconds_count{endpoint=/v1/completions}"] == 3


def test_a_failure_within_a_stream_is_counted_as_one(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 2
    assert complete(app, stream=True).status_code == 200
    found = scrape(app)
    assert found["dsc_serve_requests_total{endpoint=/v1/completions,status=500}"] == 1
    assert found["dsc_serve_generations_total{finish_reason=error}"] == 1


def test_generations_are_counted_by_how_they_ended_and_by_size(app: FastAPI, engine: FakeEngine) -> None:
    complete(app, prompt=["a", "bcd"], max_tokens=5)
    engine.script = saying("so")
    complete(app, n=2)
    complete(app, stop="s")
    engine.script, engine.fail_after = counting, 1
    complete(app)
    engine.fail_after, engine.die, engine.alive = None, True, False
    complete(app)
    engine.alive = True
    found = scrape(app)
    reasons = {key: value for key, value in found.items() if key.startswith("dsc_serve_generations_total")}
    assert reasons == {
        f"dsc_serve_generations_total{{finish_reason={reason}}}": count
        for reason, count in {"length": 2, "stop": 3, "abort": 0, "timeout": 0, "error": 2}.items()
    }
    assert found["dsc_serve_generation_prompt_tokens_bucket{le=1}"] == 1
    assert found["dsc_serve_generation_prompt_tokens_bucket{le=4}"] == found["dsc_serve_generation_output_tokens_count"]
    assert found["dsc_serve_generation_output_tokens_sum"] == found["dsc_serve_generated_tokens_total"]
    assert found["dsc_serve_time_per_output_token_seconds_count"] == 4  # of those with two tokens and more


def test_a_client_that_leaves_has_ended_its_generation(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi"}))
            await until(lambda: engine.running == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            found = samples((await client.get("/metrics")).text)
            assert found["dsc_serve_generations_total{finish_reason=abort}"] == 1

    asyncio.run(run())


def test_tokens_and_latencies_are_counted(app: FastAPI) -> None:
    complete(app, max_tokens=5, n=2)
    complete(app, max_tokens=3, stream=True, prompt=["a", "bc"])
    found = scrape(app)
    assert found["dsc_serve_prompt_tokens_total"] == 2 + 3
    assert found["dsc_serve_generated_tokens_total"] == 2 * 5 + 2 * 3
    assert found["dsc_serve_time_to_first_token_seconds_count"] == 4
    assert found["dsc_serve_inter_token_latency_seconds_count"] == 2 * 4 + 2 * 2


def test_latencies_of_a_fast_model_do_not_share_one_bucket(app: FastAPI) -> None:
    for name in ("time_to_first_token", "inter_token_latency"):
        edges = [key for key in scrape(app) if key.startswith(f"dsc_serve_{name}_seconds_bucket")]
        assert f"dsc_serve_{name}_seconds_bucket{{le=0.0005}}" in edges
        assert (
            len([edge for edge in edges if float(edge.split("le=")[1].strip("}").replace("+Inf", "inf")) <= 0.01]) > 4
        )


def test_gauges_are_read_from_the_engine_at_the_scrape(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "n": 3}))
            await until(lambda: engine.running == 3)
            found = samples((await client.get("/metrics")).text)
            assert found["dsc_serve_requests_running"] == 3
            assert found["dsc_serve_requests_waiting"] == 3
            assert found["dsc_serve_requests_waiting_by_reason{reason=blocks}"] == 3
            assert found["dsc_serve_permits_held"] == 3
            assert found["dsc_serve_permits"] == MAX_WAITING + MAX_RUNNING
            assert found["dsc_serve_kv_blocks{state=used}"] == 4
            assert found["dsc_serve_kv_blocks{state=cached}"] == 2
            assert found["dsc_serve_preemptions_total"] == 2
            assert found["dsc_serve_bank_resident_bytes{device=cuda}"] == 4096
            assert found["dsc_serve_timeouts_total"] == 1
            assert found["dsc_serve_prefix_asked_tokens_total"] == 90
            assert found["dsc_serve_prefix_cached_tokens_total"] == 32
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            found = samples((await client.get("/metrics")).text)
            assert (found["dsc_serve_requests_running"], found["dsc_serve_permits_held"]) == (0, 0)

    asyncio.run(run())


def test_an_engine_that_does_not_answer_leaves_its_gauges_out(app: FastAPI, engine: FakeEngine) -> None:
    assert "dsc_serve_requests_running" in scrape(app)
    engine.mute_stats = True
    found = scrape(app)
    assert found["dsc_serve_engine_up"] == 1
    assert "dsc_serve_requests_running" not in found
    engine.alive = False
    found = scrape(app)
    assert found["dsc_serve_engine_up"] == 0
    assert "dsc_serve_requests_running" not in found


def test_apps_do_not_share_their_counts(engine: FakeEngine) -> None:
    first, second = app_around(engine, None), app_around(engine, None)
    complete(first, prompt=[1])
    assert scrape(second)["dsc_serve_requests_total{endpoint=/v1/completions,status=200}"] == 0


def test_routing_is_told_where_the_model_has_atoms(app: FastAPI, engine: FakeEngine) -> None:
    assert not [name for name in scrape(app) if "routing" in name]
    layer = LayerRouting(30, 2, arrival=0.9, grouped=0.7, signal=1.5, dead=0.25, top=0.1, entropy=0.8)
    engine.routing = RoutingReport(
        *(10, 40, 4096, 8192, [layer, LayerRouting(20, 0)]),
        composed=20,
        grouped=5,
        rescored=300,
        screened=80,
        picks_per_atom=12.5,
    )
    found = scrape(app)
    assert found["dsc_serve_routing_steps_total"] == 10
    assert found["dsc_serve_routing_tokens_total"] == 40
    assert found["dsc_serve_routing_bank_bytes_total"] == 4096
    assert found["dsc_serve_routing_router_bytes_total"] == 8192
    assert found["dsc_serve_routing_distinct_atoms_total{layer=1}"] == 20
    assert found["dsc_serve_routing_compositions_total{path=gather}"] == 15
    assert found["dsc_serve_routing_compositions_total{path=grouped}"] == 5
    assert found["dsc_serve_routing_rescored_rows_total"] == 300
    assert found["dsc_serve_routing_screened_tokens_total"] == 80
    assert found["dsc_serve_routing_usage_picks_per_atom"] == 12.5
    assert found["dsc_serve_routing_sharing{layer=0,order=grouped}"] == 0.7
    shares = [
        found[f"dsc_serve_routing_{name}{{layer=0}}"] for name in ("signal", "dead_share", "top_share", "entropy")
    ]
    assert shares == [1.5, 0.25, 0.1, 0.8]


def test_steps_and_phases_are_told_as_the_engine_counted_them(app: FastAPI, engine: FakeEngine) -> None:
    report = engine.step_report
    report.schedule_s, report.forward_s, report.sample_s, report.output_s = 0.5, 4.0, 2.0, 1.0
    for seconds in (0.0004, 0.002, 7.0):
        report.seconds.observe(seconds)
    report.tokens.observe(48)
    engine.phases.prefill.observe(0.3)
    found = scrape(app)
    parts = [found[f"dsc_serve_step_part_seconds_total{{part={part}}}"] for part in ("schedule", "forward", "sample")]
    assert parts == [0.5, 4.0, 2.0]
    buckets = [found[f"dsc_serve_step_seconds_bucket{{le={le}}}"] for le in ("0.0005", "0.001", "0.002", "5", "+Inf")]
    assert buckets == [1, 1, 2, 2, 3]
    assert found["dsc_serve_step_tokens_sum"] == 48
    assert found["dsc_serve_request_prefill_seconds_count"] == 1
    assert found["dsc_serve_request_queue_seconds_count"] == 0


def test_the_age_of_the_last_sign_of_life_and_readiness_are_told(app: FastAPI, engine: FakeEngine) -> None:
    found = scrape(app)
    assert (found["dsc_serve_engine_heartbeat_age_seconds"], found["dsc_serve_ready"]) == (0.25, 1)
    engine.hung = engine.mute_stats = True
    found = scrape(app)
    assert (found["dsc_serve_engine_heartbeat_age_seconds"], found["dsc_serve_ready"]) == (7.5, 0)
    engine.hung = engine.mute_stats = False
    service_of(app).admission.draining = True
    assert scrape(app)["dsc_serve_ready"] == 0


def test_what_runs_is_told(app: FastAPI, engine: FakeEngine) -> None:
    (info,) = [key for key in scrape(app) if key.startswith("dsc_serve_engine_info")]
    assert f"policy={engine.policy}" in info and f"version={__version__}" in info


def test_a_scrape_after_ten_thousand_requests_is_short(app: FastAPI) -> None:
    """Requests that end in several ways, straight into the application; then 20 scrapes over HTTP's framework."""

    async def ask_in_turn(bodies: Sequence[bytes]) -> None:
        for body in bodies:
            await exchange(app, "POST", "/v1/completions", body)

    async def run() -> list[float]:
        good = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
        streamed = json.dumps({"prompt": "hi", "max_tokens": 2, "stream": True}).encode()
        bad = json.dumps({"prompt": "hi", "max_tokens": -1}).encode()
        await asyncio.gather(*(ask_in_turn([body] * 2000) for body in (good, streamed, bad, good, bad)))
        times = []
        for _ in range(20):
            began = time.process_time()
            text = await exchange(app, "GET", "/metrics")
            times.append(time.process_time() - began)
        found = samples(text.decode())
        assert found["dsc_serve_requests_total{endpoint=/v1/completions,status=200}"] == 6000
        assert found["dsc_serve_requests_total{endpoint=/v1/completions,status=400}"] == 4000
        assert found["dsc_serve_generations_total{finish_reason=length}"] == 6000
        return times

    times = asyncio.run(run())
    print(f"\na scrape: median {1e3 * statistics.median(times):.1f} ms")
    assert min(times) < 0.02


async def exchange(app: FastAPI, method: str, path: str, body: bytes = b"") -> bytes:
    """One request without a client's overhead; returns the answer's body."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "http_version": "1.1",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "root_path": "",
        "asgi": {"version": "3.0"},
    }
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    parts: list[bytes] = []

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # ended by the cancellation of whoever watches for the client's leave
        raise AssertionError

    async def send(message: Message) -> None:
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return b"".join(parts)
