"""A server as a process of its own: started, waited for, watched and stopped with all its children."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

STOP_LIMIT_S = 20.0
POLL_S = 0.1
LOG_TAIL = 15  # lines


class ServerStartError(RuntimeError):
    """A server that did not come up; with the end of what it printed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def family(pid: int) -> list[int]:
    """A process and all that it started, as far as they live."""
    found = [pid]
    for parent in found:  # grows while it is read
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in file.read_text(encoding="ascii").split()]
    return found


def memory_bytes(pids: Sequence[int]) -> int:
    """What processes hold in memory, shared pages divided among those that share them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that processes have used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A running server at `url`. start_s: seconds until it answered."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        self.url, self.log, self.start_s = f"http://127.0.0.1:{port}", log, 0.0
        self._port = port
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        return family(self._process.pid)

    def wait(self, limit_s: float) -> None:
        """Return once it lists its models. Raises StartError when it ends before, or takes longer."""
        begun = time.monotonic()
        while True:
            answers = self._answers()
            if (end := self.end()) is not None:
                raise ServerStartError(end)  # even after an answer, which another program on this port may have given
            if answers:
                break
            if time.monotonic() - begun > limit_s:
                raise ServerStartError(f"no answer to GET /v1/models within {limit_s:g} s: {self.tail()}")
            time.sleep(POLL_S)
        self.start_s = time.monotonic() - begun

    def end(self, within_s: float = 0.0) -> str | None:
        """How it ended, with the last that it printed; None where it runs on for so long."""
        try:
            status = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        return f"it ended with status {status}: {self.tail()}"

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tail(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return "\n".join(text.splitlines()[-LOG_TAIL:]) or "it printed nothing"

    def stop(self) -> None:
        """End it and its children, by force where asking does not help. Safe to call twice."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_LIMIT_S)
        finally:  # an interrupted wait leaves nobody behind either
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the group is this server's own
            self._process.wait(STOP_LIMIT_S)


@contextlib.contextmanager
def running(server: ServerProcess, limit_s: float) -> Iterator[ServerProcess]:
    """A server that answers; it is stopped at the end, and also where it does not come up."""
    try:
        server.wait(limit_s)
        yield server
    finally:
        server.stop()
