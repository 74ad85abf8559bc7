"""The engine dies, hangs, runs out of memory or meets a request that it cannot compute, while it has work to do."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_engine
import pytest
from support.running_server import RunningServer, start_server, stop_server
from support.streams import Stream, all_begun

from dsc_serve.config import resolve_model

SERVER = (str(Path(__file__).with_name("faulty_server.py")),)
PATIENCE = 3.0  # how much longer things may take than promised where others use the cores too
LONG = {"prompt": "And then", "max_tokens": 900}
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


@pytest.fixture(scope="module")
def steady() -> Iterator[RunningServer]:
    """One server for the faults that no engine dies of."""
    server = start_server(program=SERVER)
    yield server
    assert stop_server(server) == 0


def check_nothing_is_left(server: RunningServer) -> None:
    server.wait_until(server.idle, 90)
    assert server.metric('dsc_serve_kv_blocks{state="used"}') == 0
    assert server.metric("dsc_serve_permits_held") == 0
    assert server.metric("dsc_serve_invariant_repairs_total") == 0


def check_serves(server: RunningServer, count: int) -> None:
    """The next requests succeed, in streams of 20."""

    async def run() -> None:
        for _ in range(count // 20):
            streams = [Stream({"prompt": f"Request {i}", "max_tokens": 5}) for i in range(20)]
            await asyncio.gather(*(stream.run(server.url) for stream in streams))
            assert all(stream.finished for stream in streams), [stream.error for stream in streams]

    asyncio.run(run())


def ready(server: RunningServer) -> bool:
    return server.get("/health/ready").status_code == 200


def test_a_killed_engine_is_told_to_every_client_and_replaced(start: Start) -> None:
    server = start()

    async def run() -> float:
        streams = [Stream(LONG) for _ in range(32)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        await all_begun(streams)
        os.kill(server.engine_pid, signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.gather(*tasks)
        assert all("the engine process has ended" in stream.error and stream.done for stream in streams)
        assert max(stream.end for stream in streams) - killed < 2 * PATIENCE
        return killed

    killed = asyncio.run(run())
    server.wait_until(lambda: ready(server), 10 * PATIENCE)
    print(f"ready again after {time.monotonic() - killed:.1f} s")
    check_serves(server, 100)
    check_nothing_is_left(server)
    assert server.metric("dsc_serve_engine_restarts_total") == 1
    assert server.get("/health/live").status_code == 200


def test_requests_that_had_said_nothing_survive_the_engine_s_death(start: Start) -> None:
    server = start("--max-running", "2", "--max-waiting", "10")

    async def run() -> None:
        running = [Stream(LONG) for _ in range(2)]
        waiting = [Stream({"prompt": "Later", "max_tokens": 8}) for _ in range(10)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in running]
        await all_begun(running)
        tasks += [asyncio.create_task(stream.run(server.url)) for stream in waiting]
        await asyncio.to_thread(server.wait_until, lambda: server.metric("dsc_serve_requests_waiting") == 10)
        os.kill(server.engine_pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
        assert all("the engine process has ended" in stream.error for stream in running)
        assert all(stream.finished for stream in waiting), [stream.error for stream in waiting]

    asyncio.run(run())
    check_nothing_is_left(server)


def test_a_stopped_engine_is_not_ready_and_then_replaced(start: Start) -> None:
    server = start("--stall-s", "3", "--hang-s", "6")
    first = server.engine_pid

    async def run() -> None:
        streams = [Stream(LONG) for _ in range(8)]
        tasks = [asyncio.create_task(stream.run(server.url)) for stream in streams]
        await all_begun(streams)
        os.kill(first, signal.SIGSTOP)
        await asyncio.to_thread(server.wait_until, lambda: not ready(server), 10 * PATIENCE)
        await asyncio.gather(*tasks)
        assert all("the engine hangs" in stream.error and stream.done for stream in streams)

    asyncio.run(run())
    server.wait_until(lambda: ready(server), 10 * PATIENCE)
    assert server.engine_pid != first
    check_serves(server, 20)
    check_nothing_is_left(server)


@pytest.mark.parametrize(
    ("fault", "limits"),
    [
        pytest.param(faulty_engine.DIE, (), id="dies"),
        pytest.param(faulty_engine.HANG, ("--stall-s", "3", "--hang-s", "6"), id="hangs", marks=pytest.mark.full),
    ],
)
def test_a_request_that_kills_the_engine_does_not_do_so_twice(
    start: Start, fault: list[int], limits: tuple[str, ...]
) -> None:
    server = start(*limits)

    async def run() -> None:
        poison, bystander = Stream({"prompt": fault, "max_tokens": 20}), Stream(LONG)
        standing_by = asyncio.create_task(bystander.run(server.url))
        await all_begun([bystander])
        await asyncio.gather(poison.run(server.url), standing_by)
        assert poison.error and bystander.error

    asyncio.run(run())
    server.wait_until(lambda: ready(server), 10 * PATIENCE)
    check_serves(server, 20)
    assert server.metric("dsc_serve_engine_restarts_total") == 1


def test_a_poisoned_request_fails_alone(steady: RunningServer) -> None:
    async def run() -> None:
        plain = [{"prompt": f"Chapter {i}", "max_tokens": 40, "seed": i, "temperature": 0.8} for i in range(24)]
        poison = [Stream({"prompt": faulty_engine.RAISE, "max_tokens": 20}) for _ in range(2)]
        streams = [Stream(body) for body in plain]
        await asyncio.gather(*(stream.run(steady.url) for stream in [*streams, *poison]))
        assert all("RuntimeError: poison" in stream.error and stream.done for stream in poison)
        assert all(stream.finished for stream in streams), [stream.error for stream in streams]

    asyncio.run(run())
    check_nothing_is_left(steady)
    assert steady.metric("dsc_serve_engine_restarts_total") == 0


def test_memory_that_runs_out_within_a_step_ends_nobody(steady: RunningServer) -> None:
    async def run() -> None:
        hungry = Stream({"prompt": faulty_engine.MEMORY, "max_tokens": 60})
        others = [Stream({"prompt": "Word " * 30, "max_tokens": 30}) for _ in range(15)]
        await asyncio.gather(*(stream.run(steady.url) for stream in [hungry, *others]))
        assert all(stream.finished for stream in [hungry, *others]), [stream.error for stream in [hungry, *others]]

    asyncio.run(run())
    check_nothing_is_left(steady)
    assert steady.metric("dsc_serve_engine_restarts_total") == 0


@pytest.mark.full
def test_an_engine_that_cannot_come_up_again_is_given_up_on(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in resolve_model("dsc-tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    server = start(str(folder), "--max-restarts", "2")
    (folder / "model.safetensors").unlink()
    os.kill(server.engine_pid, signal.SIGKILL)
    server.wait_until(lambda: server.get("/health/live").status_code == 503, 60)
    message = server.get("/health/live").json()["error"]["message"]
    assert "started again 2 times" in message and "gives up" in message
    assert server.post("/v1/completions", prompt="x").json()["error"]["message"] == message
    assert "/" not in message, "no path of this machine"
    assert any("gives up" in line for line in server.log)
    assert any(str(folder) in line for line in server.log)
