"""The server as a process: how it starts, what it prints, how it ends."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.serving import post_bytes

from dsc_serve.config import ConfigError, ServerConfig
from dsc_serve.server.process import announcement, bind

Start = Callable[..., subprocess.Popen[str]]

PROGRAM = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from support.fake_engine import FakeEngine
from dsc_serve.config import EngineConfig, LifeConfig, ServerConfig
from dsc_serve.server import process
from dsc_serve.worker.supervisor import EngineStartError

class Supervisor:
    def __init__(self, config, life, max_unread):
        assert life.start_timeout_s == 5
    async def start(self):
        print("starting", flush=True)
        await asyncio.sleep({start_s})
        if {fail}:
            raise EngineStartError("no engine today")
        engine = FakeEngine(delay_s={delay_s})
        if {stuck}:
            engine.gate = asyncio.Event()
        return engine
    async def stop(self):
        print("engine stopped", flush=True)

process.EngineSupervisor = Supervisor
try:
    life = LifeConfig(start_timeout_s=5, drain_s={drain_s})
    process.serve(ServerConfig(port=0, life=life, engine=EngineConfig(model={folder!r})))
except EngineStartError as error:
    print("failed:", error)
print("torch" in sys.modules, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    folder = tmp_path / "my-model"
    folder.mkdir()
    processes: list[subprocess.Popen[str]] = []

    def run(
        start_s: float = 0, delay_s: float = 0, drain_s: float = 10, stuck: bool = False, fail: bool = False
    ) -> subprocess.Popen[str]:
        program = PROGRAM.format(
            tests=str(Path(__file__).parents[1]),
            folder=str(folder),
            start_s=start_s,
            delay_s=delay_s,
            drain_s=drain_s,
            stuck=stuck,
            fail=fail,
        )
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait(10)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def address_of(process: subprocess.Popen[str]) -> str:
    assert read_line(process) == "starting"
    words = read_line(process).split()
    read_line(process)
    return words[1]


def check_end(process: subprocess.Popen[str], timeout_s: float = 10) -> None:
    rest, _ = process.communicate(timeout=timeout_s)
    assert rest.split("\n") == ["engine stopped", "False", ""]  # False: torch was never loaded
    assert process.returncode == 0


def test_it_says_where_it_is_and_how_to_try_it(start: Start) -> None:
    process = start()
    assert read_line(process) == "starting"
    line, command = read_line(process), read_line(process)
    address = line.split()[1]
    assert line.startswith("dsc-serve: http://127.0.0.1:")
    assert "my-model" in line
    assert "kernels: none" in line
    assert "float32" in line
    curl, url, _, header, _, body = shlex.split(command)
    assert (curl, url) == ("curl", f"{address}/v1/completions")
    name, value = header.split(": ")
    answer = httpx.post(url, headers={name: value}, content=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 32
    process.terminate()
    check_end(process)


def test_where_keys_are_needed_the_command_to_try_it_has_a_place_for_one() -> None:
    with bind("127.0.0.1", 0) as listener:
        texts = [announcement(ServerConfig(), listener, FakeEngine().model, True, needed) for needed in (True, False)]
    assert ["-H 'Authorization: Bearer KEY' -H 'Content-Type: " in text for text in texts] == [True, False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_its_engine(start: Start, number: signal.Signals) -> None:
    process = start()
    address_of(process)
    process.send_signal(number)
    check_end(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_while_the_engine_starts(start: Start, number: signal.Signals) -> None:
    process = start(start_s=60)
    assert read_line(process) == "starting"
    process.send_signal(number)
    check_end(process)


def test_an_engine_that_does_not_start_is_its_caller_s_error(start: Start) -> None:
    process = start(fail=True)
    output, _ = process.communicate(timeout=60)
    assert output.split("\n") == ["starting", "engine stopped", "failed: no engine today", "False", ""]


def test_a_request_that_runs_is_finished_first(start: Start) -> None:
    process = start(delay_s=0.05)
    address = address_of(process)
    body = {"prompt": [1], "max_tokens": 10, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=10) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.terminate()
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    check_end(process)


@pytest.mark.parametrize(("signals", "drain_s"), [(1, 1), (2, 60)])
def test_a_request_that_does_not_end_is_cut_off(start: Start, signals: int, drain_s: int) -> None:
    process = start(stuck=True, drain_s=drain_s)
    url = httpx.URL(address_of(process))
    with socket.create_connection((url.host, url.port or 0), timeout=30) as client:
        client.sendall(post_bytes("/v1/completions", {"prompt": [1]}))
        time.sleep(0.3)
        for _ in range(signals):
            process.terminate()
            time.sleep(0.3)
        with client.makefile("rb") as stream:
            answer = stream.read()  # to the end: the body may come after the head
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"the server is shutting down" in answer
        check_end(process)


def test_an_address_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"'127.0.0.1' with port {port}.*in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="no-such-host"):
        bind("no-such-host.invalid", 0)


def test_importing_the_server_loads_no_torch() -> None:
    program = "import sys, dsc_serve.server.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
