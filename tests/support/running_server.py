"""A real server process on a free port, stopped by its own pid."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_LIMIT_S = 180
PATIENCE_S = 60.0  # of whoever waits for what a busy machine does late
SCRAPES = 10


@dataclass
class RunningServer:
    """A server that listens at `url`."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]  # what it has printed so far
    printed: threading.Thread  # ends with what it prints
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(
            limits=httpx.Limits(max_keepalive_connections=0), timeout=PATIENCE_S, verify=False
        )
    )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0])

    def get(self, path: str) -> httpx.Response:
        return self.client.get(self.url + path, timeout=PATIENCE_S)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.client.post(self.url + path, json=body, timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        """One sample of /metrics, its labels as they are written there.

        A busy engine that does not answer a scrape in time is left out of it: then it is asked again.
        """
        for _ in range(SCRAPES):
            if (value := self.metrics().get(name)) is not None:
                return value
        raise KeyError(name)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def wait_until(self, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not reached within {limit_s} s"
            time.sleep(0.05)

    def idle(self) -> bool:
        found = self.metrics()
        return found.get("dsc_serve_requests_running") == found.get("dsc_serve_requests_waiting") == 0


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def start_server(*arguments: str, program: Sequence[str] = ("-m", "dsc_serve.cli")) -> RunningServer:
    process = subprocess.Popen(
        [sys.executable, *program, "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    log: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            lines.put(line)
        lines.put(None)

    printed = threading.Thread(target=read, daemon=True)
    printed.start()
    end = time.monotonic() + START_LIMIT_S
    try:
        while (line := lines.get(timeout=max(0.1, end - time.monotonic()))) is not None:
            found = re.match(r"curl (https?://127\.0\.0\.1:\d+)", line)  # the last line of the announcement
            if found:
                return RunningServer(found.group(1), process, log, printed)
        raise AssertionError(f"the server ended: {''.join(log)}")
    except BaseException:
        process.kill()
        raise


def stop_server(server: RunningServer, limit_s: float = PATIENCE_S) -> int:
    """Ask it to stop; returns its exit status."""
    server.process.terminate()
    try:
        return server.process.wait(limit_s)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
