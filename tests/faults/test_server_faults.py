"""The server is told to stop, its clients read nothing, its disk is full, its clock jumps."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.running_server import RunningServer, memory_mb, start_server, stop_server
from support.streams import Stream, all_begun

SERVER = (str(Path(__file__).with_name("faulty_server.py")),)
Start = Callable[..., RunningServer]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[RunningServer] = []

    def run(*arguments: str) -> RunningServer:
        servers.append(start_server(*arguments, program=SERVER))
        return servers[-1]

    yield run
    for server in servers:
        assert stop_server(server) == 0


def test_told_to_stop_under_load_the_server_cuts_no_stream_short(start: Start) -> None:
    server = start("--drain-s", "60")

    async def run() -> None:
        streams = [Stream({"prompt": f"Chapter {i}", "max_tokens": 150}) for i in range(32)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        last = Stream({"prompt": "On and on", "max_tokens": 1000})  # holds the end back until all has been asked
        holding = asyncio.create_task(last.run(server.url))
        await all_begun([*streams, last])
        for pid in (server.engine_pid, server.pid):  # as service managers do
            os.kill(pid, signal.SIGTERM)
        await asyncio.to_thread(server.wait_until, lambda: server.get("/health/ready").status_code == 503)
        late = await Stream({"prompt": "Too late"}).run(server.url)
        assert (late.status, late.error) == (503, "the server is shutting down")
        assert server.get("/health/live").status_code == 200
        await asyncio.gather(*tasks)
        holding.cancel()
        assert all(stream.finished for stream in streams), [stream.error for stream in streams]

    asyncio.run(run())
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_streams_that_outlast_the_time_to_stop_end_with_the_reason(start: Start, signals: int) -> None:
    server = start("--drain-s", "0.3" if signals == 1 else "60")

    async def run() -> None:
        streams = [Stream({"prompt": "On and on", "max_tokens": 1000}) for _ in range(32)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        await all_begun(streams)
        server.process.terminate()
        if signals == 2:  # one that comes before the first was taken in is no second one
            await asyncio.to_thread(server.wait_until, lambda: server.get("/health/ready").status_code == 503, 30)
            server.process.terminate()
        await asyncio.gather(*tasks)
        assert {stream.error for stream in streams} == {"the server is shutting down"}
        assert all(stream.done for stream in streams)

    asyncio.run(run())
    assert server.process.wait(30) == 0
    server.printed.join(30)
    assert "terminate called" not in "".join(server.log), "the engine was aborted at its end"


def test_a_grammar_that_takes_a_minute_does_not_keep_its_client(start: Start) -> None:
    server = start("--grammar-timeout-s", "60", "--drain-s", "1")
    rules = " & ".join(f"/(.{{{p}}})*/" for p in (2, 3, 5, 7, 11, 13, 17, 19))
    asked = {"grammar": f"start: TEXT\nTEXT: {rules}"}
    began = time.monotonic()
    answer = server.post("/v1/completions", prompt="x", structured_outputs=asked, timeout_s=1.0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.full)])
def test_clients_that_read_nothing_are_hung_up_on_and_cost_little(start: Start, count: int) -> None:
    server = start("--send-timeout-s", "1", "--send-buffer-bytes", "4096", "--max-waiting", "1100")
    assert server.post("/v1/completions", prompt="Warm").status_code == 200
    before = memory_mb(server.pid)
    body = b'{"prompt": "On and on", "max_tokens": 900, "ignore_eos": true, "stream": true, "logprobs": 20}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    url = httpx.URL(server.url)
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((url.host, url.port))
        client.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
        clients.append(client)
    most = before
    end = time.monotonic() + 170
    while server.metric("dsc_serve_permits_held") > 0:
        most = max(most, memory_mb(server.pid))
        assert time.monotonic() < end, "they are still waited for"
        time.sleep(0.1)
    print(f"{count} slow readers: resident memory from {before:.0f} to {most:.0f} MB")
    assert most - before < 60 + 0.2 * count
    assert server.post("/v1/completions", prompt="Next").status_code == 200
    server.wait_until(server.idle)
    assert server.metric('dsc_serve_kv_blocks{state="used"}') == 0
    for client in clients:
        client.close()


def test_a_full_disk_for_logs_stops_nothing(start: Start) -> None:
    server = start("--log-file", "/dev/full", "--log-requests", "--log-level", "debug")
    for i in range(50):
        assert server.post("/v1/completions", prompt=f"Request {i}", max_tokens=2).status_code == 200
    assert server.post("/v1/completions", prompt="x", temperature=-1).status_code == 400


def test_a_clock_that_jumps_changes_no_time_limit(start: Start) -> None:
    server = start("--stall-s", "3", "--hang-s", "6")

    async def run() -> None:
        streams = [Stream({"prompt": f"Chapter {i}", "max_tokens": 300}) for i in range(16)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        await all_begun(streams)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            for pid in (server.pid, server.engine_pid):
                os.kill(pid, number)
            await asyncio.sleep(0.3)
            assert server.get("/health/ready").status_code == 200
            assert server.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200
        await asyncio.gather(*tasks)
        assert all(stream.finished for stream in streams), [stream.error for stream in streams]

    asyncio.run(run())
    assert server.metric("dsc_serve_engine_restarts_total") == 0
