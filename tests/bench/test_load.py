from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from dsc_serve.bench.load.exchange import RequestOutcome
from dsc_serve.bench.load.generator import LoadConfig, LoadError, run_load
from dsc_serve.bench.load.summary import LoadResult, format_table
from dsc_serve.bench.machine import OPENMP
from dsc_serve.config import ConfigError

Serve = Callable[..., Any]


def load(url: str, **settings: Any) -> LoadResult:
    defaults: dict[str, Any] = {"concurrency": 1, "requests": 3, "warmup": 0, "timeout_s": 20.0, "prompt_tokens": 5}
    return run_load(LoadConfig(url=url, **(defaults | settings)))


def test_times_are_those_of_the_server(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await asyncio.sleep(0.08)  # nothing, not even headers: counted in ttft
        await exchange.begin()
        await exchange.event({"choices": [{"index": 0, "text": "", "finish_reason": None}]})
        await asyncio.sleep(0.04)  # an event without a token does not end ttft
        for _ in range(5):
            await exchange.token()
            await asyncio.sleep(0.03)
        await exchange.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        await exchange.end(completion_tokens=5)

    result = load(serve(script).url, requests=4, concurrency=2)
    assert (result.completed, result.failed, result.model) == (4, 0, "fake-model")
    assert (result.total_input_tokens, result.total_output_tokens, result.uncounted) == (20, 20, 0)
    # Waits are at least as long as told; but a gap looks shorter where the event before it was read late.
    for spread, low in ((result.ttft, 119), (result.itl, 20), (result.tpot, 25), (result.e2el, 268)):
        assert spread.median is not None
        assert low <= spread.median <= low + 170
    assert 2 * 0.268 <= result.duration < 3
    assert result.request_throughput == pytest.approx(4 / result.duration)
    assert result.output_throughput == pytest.approx(20 / result.duration)
    assert result.total_token_throughput == pytest.approx(40 / result.duration)
    assert (result.max_concurrency, result.request_rate) == (2, None)


def test_requests_are_what_was_configured(serve: Serve) -> None:
    server = serve()
    load(server.url, output_tokens=7, api_key="secret")
    for exchange in server.exchanges:
        prompt = exchange.body.pop("prompt")
        assert len(prompt) == 5 and all(0 <= token < 256 for token in prompt)
        assert exchange.body == {
            "model": "fake-model",
            "max_tokens": 7,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        assert exchange.headers["authorization"] == "Bearer secret"
    other = serve()
    load(other.url + "/v1/", models=("m",), temperature=0.5, seed=11, ignore_eos=False)
    assert [exchange.body["seed"] for exchange in other.exchanges] == [11, 12, 13]
    assert all(exchange.body["model"] == "m" and "ignore_eos" not in exchange.body for exchange in other.exchanges)


def test_several_models_are_asked_for_in_turn(serve: Serve) -> None:
    server = serve()
    result = load(server.url, models=("law", "tax"), warmup=1)
    names = [exchange.body["model"] for exchange in server.exchanges]
    assert names == ["law", "tax", "law", "tax"] and result.model == "law, tax"


def test_prompts_differ_between_requests_and_repeat_with_the_seed(serve: Serve) -> None:
    first, second = serve(), serve()
    load(first.url, seed=3, warmup=2)
    load(second.url, seed=3, warmup=2)
    prompts = [exchange.body["prompt"] for exchange in first.exchanges]
    assert len({tuple(prompt) for prompt in prompts}) == 5
    assert prompts == [exchange.body["prompt"] for exchange in second.exchanges]


def test_the_closed_loop_keeps_its_streams_busy_on_as_many_connections(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await asyncio.sleep(0.02)
        await exchange.begin()
        await exchange.token()
        await exchange.end(1)

    server = serve(script)
    result = load(server.url, concurrency=4, requests=20)
    assert result.completed == 20 == len(server.exchanges)
    assert server.most_active == 4
    assert server.connections == 4


def test_warm_up_is_not_measured(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await asyncio.sleep(3 if exchange.index < 2 else 0)
        await exchange.begin()
        await exchange.token()
        await exchange.end(1)

    server = serve(script)
    result = load(server.url, concurrency=2, warmup=None)
    assert len(server.exchanges) == 5 and result.completed == 3
    assert result.ttft.p99 is not None and result.ttft.p99 < 2400
    assert result.duration < 3


@pytest.mark.parametrize("piece", [1, 3, 50])
def test_events_split_over_writes_are_put_together(serve: Serve, piece: int) -> None:
    async def script(exchange: Any) -> None:
        await exchange.begin()
        await exchange.chunk(
            b': a comment\r\n\r\nevent: x\r\ndata:{"choices": [{"text":\r\ndata: "\xc3\xa9"}]}\r\n\r\n', piece
        )
        await exchange.token("😀", piece)
        await exchange.end(2, piece)

    result = load(serve(script).url, requests=2)
    assert (result.completed, result.total_output_tokens, result.failures) == (2, 4, {})


def test_events_in_one_write_and_tokens_in_one_event_are_counted_by_usage(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await exchange.begin()
        await exchange.token("three words here")
        await asyncio.sleep(0.05)
        event = b'data: {"choices": [{"text": "", "token_ids": [1, 2]}]}\n\n'
        await exchange.chunk(event + event)
        await exchange.end(7)

    result = load(serve(script).url, requests=1)
    assert result.total_output_tokens == 7
    assert result.itl.mean is not None and result.tpot.mean is not None
    assert 15 < result.itl.mean < 100  # two gaps: 50 ms and none
    assert 30 / 6 < result.tpot.mean < 200 / 6


def test_without_usage_events_are_counted_and_the_result_says_so(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await exchange.begin()
        for _ in range(3):
            await exchange.token()
        await exchange.end()

    result = load(serve(script).url)
    assert (result.total_output_tokens, result.uncounted) == (9, 3)
    assert "3 answers had no usage" in format_table(result)


async def too_many(exchange: Any) -> None:
    await exchange.answer("429 Too Many Requests", {"error": {"message": "the queue is full", "type": "x"}})


async def silence(exchange: Any) -> None:
    await exchange.begin()
    await exchange.token()
    await asyncio.sleep(30)


async def hang_up(exchange: Any) -> None:
    exchange.close()


async def hang_up_half_way(exchange: Any) -> None:
    await exchange.begin()
    await exchange.token()
    exchange.close()


async def error_event(exchange: Any) -> None:
    await exchange.begin()
    await exchange.token()
    await exchange.event({"error": {"message": "engine died"}})
    await exchange.end()


async def no_end(exchange: Any) -> None:
    await exchange.begin()
    await exchange.token()
    await exchange.write(b"0\r\n\r\n")


async def no_tokens(exchange: Any) -> None:
    await exchange.begin()
    await exchange.token("")
    await exchange.end(1)


async def no_http(exchange: Any) -> None:
    await exchange.write(b"SSH-2.0-OpenSSH\r\n")


async def no_json(exchange: Any) -> None:
    await exchange.begin()
    await exchange.chunk(b"data: {nonsense\n\n")
    await asyncio.sleep(30)


async def no_stream(exchange: Any) -> None:
    await exchange.answer("200 OK", {"choices": [{"text": "all at once"}]})


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        (too_many, "HTTP 429", "the queue is full"),
        (silence, "timeout", "no end within 0.5 s"),
        (hang_up, "disconnect", "the server closed the connection"),
        (hang_up_half_way, "disconnect", "the server closed the connection"),
        (error_event, "error event", "engine died"),
        (no_end, "incomplete stream", "without [DONE]"),
        (no_tokens, "no tokens", "no event carried"),
        (no_http, "malformed answer", "not HTTP"),
        (no_json, "malformed answer", "an event is not a completion"),
        (no_stream, "incomplete stream", "without [DONE]"),
    ],
)
def test_a_failure_is_counted_by_reason_and_the_rest_goes_on(
    serve: Serve, fault: Callable[[Any], Any], reason: str, detail: str
) -> None:
    async def script(exchange: Any) -> None:
        if exchange.index == 1:
            await fault(exchange)
            return
        await exchange.begin()
        await exchange.token()
        await exchange.end(1)

    result = load(serve(script).url, requests=4, timeout_s=0.5)
    assert result.failures == {reason: 1}
    assert detail in result.failure_examples[reason]
    assert (result.completed, result.failed, result.total_output_tokens) == (3, 1, 3)
    assert f"1 × {reason}: " in format_table(result)


def test_a_request_that_times_out_is_given_up_at_the_server_too(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await exchange.begin()
        while True:
            await exchange.token()
            await asyncio.sleep(0.01)

    server = serve(script)
    assert load(server.url, requests=2, timeout_s=0.2).failures == {"timeout": 2}
    deadline = time.monotonic() + 5
    while server.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (server.active, server.hung_up) == (0, 2)


def test_a_server_that_closes_after_the_last_event_has_answered(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await exchange.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        await exchange.write(b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')
        exchange.close()

    result = load(serve(script).url)
    assert (result.completed, result.failures) == (3, {})


def test_the_run_ends_at_its_duration(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await asyncio.sleep(0.05)
        await exchange.begin()
        await exchange.token()
        await exchange.end(1)

    server = serve(script)
    result = load(server.url, requests=10_000, concurrency=2, duration_s=0.3)
    assert 2 <= result.completed <= 14
    assert result.completed == len(server.exchanges)  # those in flight were waited for
    assert 0.3 <= result.duration < 2


def test_a_run_in_which_all_failed_says_so_and_claims_no_times(serve: Serve) -> None:
    result = load(serve(too_many).url)
    assert (result.completed, result.failed, result.output_throughput) == (0, 3, 0)
    flat = result.to_dict()
    assert flat["mean_ttft_ms"] is None and flat["p99_itl_ms"] is None
    assert "Every request failed:\n  3 × HTTP 429: the queue is full" in format_table(result)


def test_a_server_that_is_gone_is_counted_not_raised() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    result = load(url, models=("m",))
    assert result.failures == {"cannot connect": 3}
    with pytest.raises(LoadError, match="does not answer GET /v1/models"):
        load(url)


def test_waiting_in_the_client_is_told_and_counted_in_every_time(serve: Serve) -> None:
    async def script(exchange: Any) -> None:
        await asyncio.sleep(0.05)
        await exchange.begin()
        await exchange.token()
        await exchange.end(1)

    server = serve(script)
    seen: list[RequestOutcome] = []
    settings = {"arrivals": "poisson", "request_rate": 1000.0, "max_in_flight": 1, "requests": 6}
    result = run_load(LoadConfig(url=server.url, warmup=0, prompt_tokens=5, **settings), seen.append)
    assert server.most_active == 1 and result.completed == 6 == len(seen)
    assert all(outcome.ttft >= outcome.queued + 0.045 for outcome in seen)
    last = max(seen, key=lambda outcome: outcome.due)
    assert last.queued > 0.15  # five others of 50 ms each went before it
    assert result.queue.mean == pytest.approx(1e3 * sum(outcome.queued for outcome in seen) / 6)


def test_a_server_without_models_cannot_be_loaded(serve: Serve) -> None:
    with pytest.raises(LoadError, match="lists no model"):
        load(serve(models=[]).url)


def test_the_result_tells_what_was_measured_where_but_not_the_key(serve: Serve) -> None:
    server = serve()
    flat = json.loads(json.dumps(load(server.url, api_key="secret").to_dict()))
    assert flat["url"] == server.url and flat["date"].endswith("+00:00")
    assert flat["config"]["concurrency"] == 1 and flat["config"]["url"] == server.url
    client = {"cpu", "cores", "system", "python", "load_average_start", "load_average_end", "client_cpu"}
    assert set(flat["client"]) - set(OPENMP) == client and flat["client"]["cpu"]
    assert "secret" not in json.dumps(flat)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency is 0; it must be at least 1"),
        ({"requests": 0}, "requests is 0; it must be at least 1"),
        ({"duration_s": float("inf")}, "duration_s is inf; it must be a finite number above 0"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0; it must be a finite number above 0"),
        ({"warmup": -1}, "warmup is -1; it must be at least 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"arrivals": "bursty"}, "arrivals is 'bursty'; it must be one of closed, poisson, gamma, ramp, burst"),
        ({"tokenizer": "x"}, "tokenizer is 'x'; it is of use only together with prompt_file or sharegpt"),
        ({"sharegpt": "x", "prompt_file": "y"}, "sharegpt is 'x'; it is of use only without prompt_file"),
        ({"prefixes": 2}, "prefixes is 2; it is of use only together with prefix_tokens"),
        ({"prefix_tokens": -1}, "prefix_tokens is -1; it must be at least 0"),
        ({"burstiness": 0.5}, "burstiness is 0.5; it is of use only with arrivals gamma"),
        ({"burstiness": 0.0, "arrivals": "gamma"}, "burstiness is 0.0; it must be a finite number above 0"),
        ({"end_rate": 2.0}, "end_rate is 2.0; it is of use only with arrivals ramp"),
        ({"arrivals": "ramp"}, "end_rate is not set; a ramp needs it"),
        ({"max_in_flight": 2}, "max_in_flight is 2; it is of use only with open arrivals"),
        ({"max_in_flight": 0, "arrivals": "poisson"}, "max_in_flight is 0; it must be at least 1"),
        ({"output_tokens": "many"}, "output_tokens is 'many'; it must be a number, uniform:LOW:HIGH"),
        ({"goodput": ("itl:1",)}, "goodput is 'itl:1'; it must be NAME:MILLISECONDS"),
        ({"api_key": "a\r\nb"}, "api_key holds a character that no header can carry"),
        ({"url": "ftp://x"}, "url is 'ftp://x'; it must be of the form http://host:port"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoadConfig(**({"url": "http://localhost"} | settings))
