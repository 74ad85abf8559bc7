"""Replicas behind one door: a kill costs only its own streams, two do twice the work, prefixes find their replica."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import psutil
import pytest
from support.ray_cluster import Cluster
from support.streams import Stream

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.stop()


async def follow(cluster: Cluster, bodies: list[dict[str, Any]]) -> list[Stream]:
    streams = [Stream(body) for body in bodies]
    await asyncio.gather(*(stream.run(cluster.url) for stream in streams))
    return streams


def test_a_killed_replica_ends_its_own_streams_alone(cluster: Cluster) -> None:
    """64 streams, half of them still waiting: they have said nothing, so the other replica serves them."""
    cluster.configure({"max_running": 16})

    async def run() -> None:
        streams = [Stream({"prompt": f"Chapter {i}", "max_tokens": 60, "user": f"user {i}"}) for i in range(64)]
        tasks = [asyncio.create_task(stream.run(cluster.url)) for stream in streams]
        await until(lambda: sum(stream.begun.is_set() for stream in streams) == 32)
        begun = {id(stream) for stream in streams if stream.begun.is_set()}
        held = Counter(stream.headers["x-dsc-replica"] for stream in streams if id(stream) in begun)
        assert sorted(held.values()) == [16, 16]
        cluster.serving("replica")[0].send_signal(signal.SIGKILL)
        await asyncio.gather(*tasks)
        lost = [stream for stream in streams if stream.error]
        dead = {stream.headers["x-dsc-replica"] for stream in lost}
        print(f"killed: {len(lost)} of 64 streams ended, all on {dead}")
        assert {stream.error for stream in lost} == {"the replica that served this request has died"}
        assert len(dead) == 1 and len(lost) == 16
        assert all(id(stream) in begun and stream.done for stream in lost)
        assert all(stream.finished for stream in streams if stream not in lost)

    asyncio.run(run())
    cluster.wait_until(lambda: len(cluster.sample("dsc_serve_engine_up")) == 2, 60)


async def until(condition: Any, limit_s: float = 60) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  what is waited for knows of no event
            await asyncio.sleep(0.02)


def test_two_replicas_do_twice_the_work_of_one(cluster: Cluster) -> None:
    bodies = [{"prompt": f"Chapter {i}", "max_tokens": 20} for i in range(48)]

    def seconds(replicas: int) -> float:
        cluster.configure({"max_running": 8, "max_waiting": 40}, num_replicas=replicas)
        start = time.monotonic()
        streams = asyncio.run(follow(cluster, bodies))
        passed = time.monotonic() - start
        assert all(stream.finished for stream in streams), {stream.error for stream in streams}
        assert len({stream.headers["x-dsc-replica"] for stream in streams}) == replicas
        return passed

    one, two = seconds(1), seconds(2)
    print(f"48 streams of 20 tokens: {one:.2f} s with one replica, {two:.2f} s with two, ratio {one / two:.2f}")
    assert one / two >= 1.7


TENANTS, TURNS = 16, 6
FIRST, MORE = 320, 48  # tokens of a tenant's first prompt, and what every turn adds


def conversations() -> list[list[dict[str, Any]]]:
    """Turns of tenants that ask in any order, each with a prompt of its own that grows by question and answer."""
    turns: list[list[dict[str, Any]]] = []
    for turn in range(TURNS):
        prompts = {f"tenant {i}": [5 + i] * FIRST + [200 + i] * MORE * turn for i in range(TENANTS)}
        turns.append([{"prompt": ids, "user": user, "max_tokens": 2} for user, ids in prompts.items()])
        random.Random(turn).shuffle(turns[-1])
    return turns


def hit_rate(cluster: Cluster, routing: str) -> float:
    """Share of the prompts' tokens that replicas found in their caches, each of which holds 3/4 of all prompts."""
    room = TENANTS * (FIRST + MORE * TURNS) * 3 // 4
    cluster.configure({"routing": routing, "kv_tokens": room, "served_model_name": routing})
    for bodies in conversations():
        streams = asyncio.run(follow(cluster, bodies))
        assert all(stream.finished for stream in streams), {stream.error for stream in streams}
    cached, asked = (cluster.sample(f"dsc_serve_prefix_{what}_tokens_total") for what in ("cached", "asked"))
    return sum(cached.values()) / sum(asked.values())


def test_affinity_finds_prefixes_that_round_robin_computes_again(cluster: Cluster) -> None:
    affinity, turns = hit_rate(cluster, "affinity"), hit_rate(cluster, "round-robin")
    print(f"prompt tokens found in the cache: {affinity:.0%} by affinity, {turns:.0%} in turns")
    assert affinity > max(0.65, 1.1 * turns)


def test_a_rolling_update_drops_no_request(cluster: Cluster) -> None:
    cluster.configure({"served_model_name": "old"})
    served: Counter[str] = Counter()
    over = asyncio.Event()

    async def client(number: int) -> None:
        while not over.is_set():
            stream = await Stream({"prompt": f"Chapter {number}", "max_tokens": 12}).run(cluster.url)
            assert stream.finished, (stream.status, stream.error)
            served[stream.events[0]["model"]] += 1

    async def run() -> None:
        clients = [asyncio.create_task(client(i)) for i in range(16)]
        await asyncio.to_thread(cluster.configure, {"served_model_name": "new"})
        new = served["new"]
        await until(lambda: served["new"] > new + 32)
        over.set()
        await asyncio.gather(*clients)

    asyncio.run(run())
    print(f"served during a rolling update: {dict(served)}")
    assert set(served) == {"old", "new"}
    assert httpx.get(f"{cluster.url}/v1/models", timeout=60).json()["data"][0]["id"] == "new"


def test_a_queue_brings_a_replica_and_its_end_takes_it_away(cluster: Cluster) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "metrics_interval_s": 1,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
    }
    cluster.configure({"max_running": 4, "max_waiting": 60}, autoscaling_config=scaling)
    cluster.wait_until(lambda: len(cluster.serving("replica")) == 1, 60)

    async def run() -> None:
        streams = [Stream({"prompt": f"Chapter {i}", "max_tokens": 40}) for i in range(48)]
        tasks = [asyncio.create_task(stream.run(cluster.url)) for stream in streams]
        await until(lambda: len(cluster.serving("replica")) == 2)
        await asyncio.gather(*tasks)
        assert all(stream.finished for stream in streams), {stream.error for stream in streams}

    asyncio.run(run())
    cluster.wait_until(lambda: len(cluster.serving("replica")) == 1, 90)


def test_the_door_speaks_as_the_server_does(cluster: Cluster) -> None:
    cluster.configure({"max_running": 2, "max_waiting": 1, "take_s": 1, "door_waiting": 8})

    def post(path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        return httpx.post(cluster.url + path, json={"prompt": "Once", "max_tokens": 2, **fields}, timeout=60)

    whole = post(stream=False)
    assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 2
    assert whole.headers["x-request-id"]
    for response, status, code in (
        (post(temperature=-1), 400, "invalid_value"),
        (post(model="other"), 404, "model_not_found"),
        (post("/v1/nothing"), 404, "unknown_url"),
        (
            httpx.post(f"{cluster.url}/v1/completions", content=b"{}", headers={"content-type": "x"}, timeout=60),
            400,
            "invalid_type",
        ),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert httpx.get(f"{cluster.url}/health/ready", timeout=60).status_code == 200
    assert "/v1/completions" in httpx.get(f"{cluster.url}/openapi.json", timeout=60).json()["paths"]

    async def crowd() -> list[Stream]:
        return await follow(cluster, [{"prompt": f"Chapter {i}", "max_tokens": 30} for i in range(16)])

    streams = asyncio.run(crowd())
    assert {stream.status for stream in streams if not stream.finished} <= {429, 503}
    assert 429 in {stream.status for stream in streams}
    assert any(stream.finished for stream in streams)


def test_a_client_that_leaves_frees_its_place(cluster: Cluster) -> None:
    cluster.configure({})
    with httpx.stream(
        "POST", f"{cluster.url}/v1/completions", json={"prompt": "On", "max_tokens": 900, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()  # which must live on: its end closes the connection
        assert next(lines).startswith('data: {"id"')
        assert cluster.sample("dsc_serve_permits_held")[response.headers["x-dsc-replica"]] == 1
    cluster.wait_until(lambda: sum(cluster.sample("dsc_serve_permits_held").values()) == 0)


def test_no_torch_outside_engines_and_nobody_elsewhere_can_call(cluster: Cluster) -> None:
    serving = [*cluster.serving("replica"), *cluster.serving("door")]
    assert len(serving) == 3
    for process in serving:
        assert not [found.path for found in process.memory_maps() if "libtorch" in found.path]
    listening = [
        connection.laddr
        for process in cluster.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    outside = [address.port for address in listening if "127.0.0.1" not in address.ip]
    assert len(listening) > len(outside) == 3  # Ray Serve's ports between door and replicas, which ask for a token
    for port in outside:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
