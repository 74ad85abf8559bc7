"""One of the processes that share a model dies, or hangs, while it has work to do."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from support.ranks import followers, runs
from support.running_server import RunningServer, start_server, stop_server
from support.streams import Stream, all_begun

PATIENCE = 3.0  # how much longer things may take than promised where others use the cores too
LONG = {"prompt": "And then", "max_tokens": 900}


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    servers: list[RunningServer] = []

    def run(*arguments: str) -> RunningServer:
        servers.append(start_server("--tensor-parallel", "2", *arguments))
        return servers[-1]

    yield run
    for server in servers:
        others = followers(server.engine_pid)
        assert len(others) == 1
        assert stop_server(server) == 0
        gone(others)


def gone(pids: list[int]) -> None:
    end = time.monotonic() + 5 * PATIENCE
    while any(map(runs, pids)):
        assert time.monotonic() < end, f"of {pids} some still run"
        time.sleep(0.05)


def serves(server: RunningServer) -> None:
    server.wait_until(lambda: server.get("/health/ready").status_code == 200)
    answer = server.post("/v1/completions", prompt="Once", max_tokens=5, temperature=0)
    assert answer.status_code == 200, answer.text
    server.wait_until(server.idle)
    assert server.metric('dsc_serve_kv_blocks{state="used"}') == 0
    assert server.metric("dsc_serve_engine_restarts_total") == 1


def interrupted(server: RunningServer, end: Callable[[], None], words: str) -> None:
    """Streams that have begun are told; what is left is nothing."""

    async def run() -> None:
        streams = [Stream(LONG) for _ in range(4)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        await all_begun(streams)
        end()
        await asyncio.gather(*tasks)
        assert all(words in stream.error and stream.done for stream in streams), [stream.error for stream in streams]

    asyncio.run(run())


def test_either_rank_that_is_killed_is_replaced_with_the_other(start: Callable[..., RunningServer]) -> None:
    for victim in (0, 1):
        server = start()
        pids = [server.engine_pid, *followers(server.engine_pid)]
        assert len(pids) == 2
        interrupted(server, partial(os.kill, pids[victim], signal.SIGKILL), "the engine process has ended")
        gone(pids)
        serves(server)


def test_a_rank_that_is_killed_while_nobody_asks_is_replaced_at_once(start: Callable[..., RunningServer]) -> None:
    server = start()
    pids = [server.engine_pid, *followers(server.engine_pid)]
    os.kill(pids[1], signal.SIGKILL)
    gone(pids)
    server.wait_until(lambda: server.metric("dsc_serve_engine_restarts_total") == 1)
    serves(server)


@pytest.mark.full
def test_a_rank_that_is_stopped_is_noticed_and_both_are_replaced(start: Callable[..., RunningServer]) -> None:
    server = start("--stall-s", "3", "--hang-s", "6")
    pids = [server.engine_pid, *followers(server.engine_pid)]
    interrupted(server, lambda: os.kill(pids[1], signal.SIGSTOP), "the engine hangs")
    gone(pids)
    serves(server)
