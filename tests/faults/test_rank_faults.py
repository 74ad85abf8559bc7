"""One of the processes that share a model dies, or hangs, while it has work to do or none."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.ranks import followers, runs
from support.running_server import RunningServer, start_server, stop_server
from support.streams import Stream, all_begun

PATIENCE = 3.0  # how much longer things may take than promised where others use the cores too
LONG = {"prompt": "And then", "max_tokens": 900}
RESTARTS = "dsc_serve_engine_restarts_total"


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    yield from running()


def running(*arguments: str) -> Iterator[RunningServer]:
    """A server whose model two ranks share, and of which nothing is left when it has been stopped."""
    server = start_server("--tensor-parallel", "2", *arguments)
    try:
        yield server
        pids = ranks(server)
    finally:
        status = stop_server(server)
    assert status == 0
    gone(pids)


def ranks(server: RunningServer) -> list[int]:
    pids = [server.engine_pid, *followers(server.engine_pid)]
    assert len(pids) == 2
    return pids


def gone(pids: list[int]) -> None:
    end = time.monotonic() + 5 * PATIENCE
    while any(map(runs, pids)):
        assert time.monotonic() < end, f"of {pids} some still run"
        time.sleep(0.05)


def check_replaced(server: RunningServer, restarts: float, before: list[int]) -> None:
    gone(before)
    server.wait_until(lambda: server.metric(RESTARTS) == restarts + 1)
    server.wait_until(lambda: server.get("/health/ready").status_code == 200)
    assert not set(ranks(server)) & set(before)
    answer = server.post("/v1/completions", prompt="Once", max_tokens=5, temperature=0)
    assert answer.status_code == 200, answer.text
    server.wait_until(server.idle)
    assert server.metric('dsc_serve_kv_blocks{state="used"}') == 0


def interrupt(server: RunningServer, harm: Callable[[], None], words: str) -> None:
    """All streams that have begun are told."""

    async def run() -> None:
        streams = [Stream(LONG) for _ in range(4)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        await all_begun(streams)
        harm()
        await asyncio.gather(*tasks)
        assert all(words in stream.error and stream.done for stream in streams), [stream.error for stream in streams]

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_told_to_clients_and_replaced_with_the_other(shared: RunningServer, rank: int) -> None:
    pids, restarts = ranks(shared), shared.metric(RESTARTS)
    interrupt(shared, lambda: os.kill(pids[rank], signal.SIGKILL), "the engine process has ended")
    check_replaced(shared, restarts, pids)


def test_a_rank_that_is_killed_while_nobody_asks_is_replaced_at_once(shared: RunningServer) -> None:
    pids, restarts = ranks(shared), shared.metric(RESTARTS)
    os.kill(pids[1], signal.SIGKILL)
    check_replaced(shared, restarts, pids)


@pytest.mark.full
def test_a_rank_that_is_stopped_is_noticed_and_both_are_replaced() -> None:
    with contextmanager(running)("--stall-s", "3", "--hang-s", "6") as server:
        pids = ranks(server)
        interrupt(server, lambda: os.kill(pids[1], signal.SIGSTOP), "the engine hangs")
        check_replaced(server, 0, pids)
