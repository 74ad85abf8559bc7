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
import msgspec
import pytest
from support.fake_engine import FakeEngine
from support.serving import post_bytes

from dsc_serve.config import ConfigError, ServerConfig
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.process import announcement, bind, is_loopback, warn_if_open

Start = Callable[..., subprocess.Popen[str]]

PROGRAM = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from support.fake_engine import FakeEngine
from dsc_serve.config import ConfigError, EngineConfig, LifeConfig, ServerConfig
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
    process.serve(ServerConfig(host={host!r}, port={port}, life=life, engine=EngineConfig(model={folder!r})))
except EngineStartError as error:
    print("failed:", error)
except ConfigError as error:
    print("refused:", error, flush=True)
print("torch" in sys.modules, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    folder = tmp_path / "my-model"
    folder.mkdir()
    processes: list[subprocess.Popen[str]] = []

    def run(
        start_s: float = 0,
        delay_s: float = 0,
        drain_s: float = 10,
        stuck: bool = False,
        fail: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> subprocess.Popen[str]:
        program = PROGRAM.format(
            tests=str(Path(__file__).parents[1]),
            folder=str(folder),
            start_s=start_s,
            delay_s=delay_s,
            drain_s=drain_s,
            stuck=stuck,
            fail=fail,
            host=host,
            port=port,
        )
        command = [sys.executable, "-c", program]
        err = subprocess.PIPE if host != "127.0.0.1" else None
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
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


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not reached within {limit_s:g} s"
        time.sleep(0.02)


def check_end(process: subprocess.Popen[str], timeout_s: float = 30) -> None:
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
    answer = httpx.post(url, headers={name: value}, content=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 32
    process.terminate()
    check_end(process)


def test_where_keys_are_needed_the_command_to_try_it_has_a_place_for_one() -> None:
    with bind("127.0.0.1", 0) as listener:
        texts = [announcement(ServerConfig(), listener, FakeEngine().model, True, needed) for needed in (True, False)]
    assert ["-H 'Authorization: Bearer KEY' -H 'Content-Type: " in text for text in texts] == [True, False]


def test_what_was_captured_is_told_where_anything_was() -> None:
    model = FakeEngine().model
    with bind("127.0.0.1", 0) as listener:
        one, other = (
            announcement(ServerConfig(), listener, msgspec.structs.replace(model, captured=text), True, False)
            for text in ("", "7 graphs for steps of 1 to 32 sequences")
        )
    assert "dsc-serve: 7 graphs for steps of 1 to 32 sequences\ncurl" in other
    assert other.replace("dsc-serve: 7 graphs for steps of 1 to 32 sequences\n", "") == one


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
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
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
    with socket.create_connection((url.host, url.port or 0), timeout=60) as client:
        client.sendall(post_bytes("/v1/completions", {"prompt": [1]}))
        wait_until(
            lambda: "dsc_serve_permits_held 1.0" in httpx.get(url.join("/metrics"), timeout=60).text.splitlines()
        )
        process.terminate()
        if signals == 2:  # one that comes before the first was taken in is no second one
            wait_until(lambda: httpx.get(url.join("/health/ready"), timeout=60).status_code == 503)
            process.terminate()
        with client.makefile("rb") as stream:
            answer = stream.read()  # to the end: the body may come after the head
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"the server is shutting down" in answer
        check_end(process)


def test_an_address_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:  # which has not taken a connection yet, nor loaded a model
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"'127.0.0.1' with port {port}.*in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="no-such-host"):
        bind("no-such-host.invalid", 0)


@pytest.mark.parametrize("count", [3])
def test_of_servers_that_start_at_once_on_one_port_one_serves_and_the_others_say_why(start: Start, count: int) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    servers = [start(start_s=1, port=port) for _ in range(count)]
    said = [read_line(server) for server in servers]
    (winner,) = [server for server, line in zip(servers, said, strict=True) if line == "starting"]
    for server, line in zip(servers, said, strict=True):
        if server is not winner:
            assert line.startswith("refused: ") and f"port {port}" in line and "in use" in line
            assert server.wait(30) == 0
    line = read_line(winner)
    assert httpx.get(f"{line.split()[1]}/health/live", timeout=60).status_code == 200
    read_line(winner)
    winner.terminate()
    check_end(winner)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("fe80::1%eth0", False),
        ("::ffff:8.8.8.8", False),
    ],
)
def test_only_loopback_addresses_are_reached_from_this_machine_alone(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("0.0.0.0", "", True), ("127.0.0.1", "", False), ("0.0.0.0", f"me:{'k' * 16}", False), ("localhost", "", False)],
)
def test_an_address_that_others_reach_without_keys_is_warned_of(
    host: str, keys: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with bind(host, 0) as listener:
        warn_if_open(listener, KeyRing("", keys))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert ("not a loopback address" in caplog.text and "key_file" in caplog.text) == warned


def test_the_warning_is_in_the_log_of_the_server_that_starts(start: Start) -> None:
    process = start(host="0.0.0.0")
    address_of(process)
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert "no API keys are set and 0.0.0.0 is not a loopback address" in log


def test_importing_the_server_loads_no_torch() -> None:
    program = "import sys, dsc_serve.server.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
