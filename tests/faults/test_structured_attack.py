"""Grammars that are dear to compile or to follow: their senders are told, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.running_server import RunningServer, cpu_seconds, memory_mb, start_server, stop_server

pytestmark = pytest.mark.alone
ATTACKERS = str(Path(__file__).with_name("attackers.py"))
NEIGHBOURS = 2
CLIENTS = 8
MEMORY_MB = 700
HONEST = 50
QUIET_S = 5.0


@pytest.fixture
def server() -> Iterator[RunningServer]:
    running = start_server()
    yield running
    assert stop_server(running) == 0


def busy_seconds() -> float:
    """Processor time that all of the machine has used."""
    user, nice, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


class Neighbour:
    """A client that streams all the time. gaps: seconds between its events."""

    def __init__(self, url: str, number: int) -> None:
        self.url, self.number = url, number
        self.gaps: list[float] = []
        self.refused: list[str] = []

    async def run(self, client: httpx.AsyncClient) -> None:
        turn = 0
        while True:
            turn += 1
            body = {"prompt": f"Chapter {turn} of {self.number}", "max_tokens": 400, "stream": True, "ignore_eos": True}
            last = None
            async with client.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
                if response.status_code != 200:
                    self.refused.append((await response.aread()).decode())
                    await asyncio.sleep(0.1)
                    continue
                async for line in response.aiter_lines():
                    if '"error"' in line:
                        self.refused.append(line)
                    if line:
                        now = time.monotonic()
                        if last is not None:
                            self.gaps.append(now - last)
                        last = now


async def ordinary(client: httpx.AsyncClient, url: str, number: int) -> tuple[int, float, Any]:
    """An ordinary schema, that nobody has sent before: its status, seconds until its first token, and its answer."""
    schema = {
        "type": "object",
        "properties": {
            f"name{number}": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "maxItems": 3},
        },
        "required": [f"name{number}", "age"],
        "additionalProperties": False,
    }
    body = {"prompt": "A person:", "max_tokens": 120, "stream": True, "structured_outputs": {"json": schema}}
    begun, first, text, reason = time.monotonic(), 0.0, "", None
    async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.monotonic() - begun
                event = json.loads(line[6:])
                choice = event["choices"][0] if "choices" in event else {"text": line, "finish_reason": "error"}
                text, reason = text + choice["text"], choice["finish_reason"] or reason
    assert reason in ("stop", "length"), text
    assert reason == "length" or 0 <= json.loads(text)["age"] <= 150
    return response.status_code, first, text


@pytest.mark.parametrize("seconds", [12, pytest.param(60, marks=pytest.mark.full)])
@pytest.mark.timeout(300)
def test_an_attack_by_grammars_is_not_noticed(server: RunningServer, seconds: int) -> None:
    neighbours = [Neighbour(server.url, i) for i in range(NEIGHBOURS)]
    largest = {"server": 0.0, "engine": 0.0}
    others: list[float] = []  # cores that others took before the attack

    async def watch() -> None:
        while True:
            for name, pid in (("server", server.pid), ("engine", server.engine_pid)):
                largest[name] = max(largest[name], memory_mb(pid))
            await asyncio.sleep(0.2)

    async def run() -> tuple[list[float], list[Any], list[Any]]:
        async with httpx.AsyncClient() as client:
            tasks = [asyncio.create_task(neighbour.run(client)) for neighbour in neighbours]
            tasks.append(asyncio.create_task(watch()))
            pids = (server.pid, server.engine_pid, os.getpid())
            before, own = busy_seconds(), sum(map(cpu_seconds, pids))
            await asyncio.sleep(QUIET_S)
            others.append((busy_seconds() - before - sum(map(cpu_seconds, pids)) + own) / QUIET_S)
            quiet = [gap for neighbour in neighbours for gap in neighbour.gaps]
            for neighbour in neighbours:
                neighbour.gaps.clear()
            command = [sys.executable, ATTACKERS, server.url, str(seconds), str(CLIENTS)]
            attack = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            honest = []
            for number in range(HONEST):
                honest.append(await ordinary(client, server.url, number))
                await asyncio.sleep(max(0.0, seconds / HONEST - honest[-1][1] - 0.05))
            output, _ = await attack.communicate()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return quiet, json.loads(output), honest

    quiet, attacks, honest = asyncio.run(run())
    gaps = [gap for neighbour in neighbours for gap in neighbour.gaps]
    ratio = statistics.median(gaps) / statistics.median(quiet)
    slowest, slowest_honest = max(attacks, key=lambda one: one[2]), max(first for _, first, _ in honest)
    print(
        f"\n{len(attacks)} attacks, the slowest answered after {slowest[2]:.2f} s; neighbours: median gap {ratio:.2f} "
        f"times quiet, largest {max(gaps):.3f} s (quiet {max(quiet):.3f}); {len(honest)} ordinary schemas, the "
        f"slowest first token after {slowest_honest:.2f} s; server {largest['server']:.0f} MB, "
        f"engine {largest['engine']:.0f} MB; "
        f"others took {others[0]:.2f} cores"
    )
    assert [one for neighbour in neighbours for one in neighbour.refused] == []
    assert server.metric("dsc_serve_engine_restarts_total") == 0
    assert all(size < MEMORY_MB for size in largest.values())
    # What can be followed on a machine this fast is answered; everything else is its sender's fault.
    assert {(kind, status) for kind, status, _, _ in attacks} <= {
        *((kind, 400) for kind, _, _, _ in attacks),
        *((kind, 200) for kind in ("blank_lines", "choice", "half_a_second", "nested", "repetitions")),
    }, [one for one in attacks if one[1] != 400][:5]
    # Where others want the same cores, everything takes as much longer as it did before the attack, and more unevenly.
    slack = 1.0 if others[0] < 0.5 else 3.0
    assert slowest[2] < 6 * slack, slowest
    assert all(status == 200 for status, _, _ in honest)
    assert slowest_honest < 2 * slack
    assert ratio < 1.5 * slack
    assert max(gaps) < max(0.5, 2 * max(quiet)) * slack
