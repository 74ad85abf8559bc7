"""`dsc-serve serve-ray` as a process, with everything that it starts, stopped by its own pid."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

START_S = 300.0
STOP_S = 60.0
TESTS = Path(__file__).parents[1]


class Cluster:
    """Two replicas of the timed engine, unless told otherwise. file: its Serve config, written by `configure`."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.file = folder / "serve.yaml"
        self.log: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    def configure(self, args: dict[str, Any], *, import_path: str = "timed_app:build", **replica: Any) -> None:
        """Bring the cluster to these settings and options of the replicas, and wait until it is there."""
        application = {
            "name": "dsc-serve",
            "route_prefix": "/",
            "import_path": import_path,
            "args": {"threads": 1, **args},
            "deployments": [{"name": "replica", "ray_actor_options": {"num_cpus": 0}, "num_replicas": 2} | replica],
        }
        if "autoscaling_config" in replica:
            del application["deployments"][0]["num_replicas"]
        http = {"host": "127.0.0.1", "port": self.port}
        told = self.announced()
        self.file.write_text(json.dumps({"http_options": http, "applications": [application]}))  # JSON is YAML
        if self._process is None:
            self._start()
        else:
            self._process.send_signal(signal.SIGHUP)
        self.wait_until(lambda: self.announced() > told, START_S)

    def announced(self) -> int:
        return sum(line.startswith(f"dsc-serve: {self.url} serves") for line in self.log)

    def _start(self) -> None:
        paths = [str(TESTS / "deploy"), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dsc_serve.cli", "serve-ray", str(self.file)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.log.extend(process.stdout)

    def wait_until(self, condition: Callable[[], bool], limit_s: float = 30.0) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not reached within {limit_s} s: {''.join(self.log[-30:])}"
            assert self._process is None or self._process.poll() is None, "".join(self.log[-30:])
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        assert self._process is not None
        return psutil.Process(self._process.pid).children(recursive=True)

    def serving(self, deployment: str) -> list[psutil.Process]:
        """The processes that Ray runs a deployment in."""
        title, found = f"ray::ServeReplica:dsc-serve:{deployment}", []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def sample(self, name: str) -> dict[str, float]:
        """One metric without labels of its own, by replica."""
        found = re.findall(
            rf'^{name}{{replica="(\w+)"}} (\S+)$', httpx.get(f"{self.url}/metrics", timeout=60).text, re.MULTILINE
        )
        return {replica: float(value) for replica, value in found}

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        children = self.processes()
        self._process.terminate()
        try:
            assert self._process.wait(STOP_S) == 0, "".join(self.log[-30:])
        finally:
            _, left = psutil.wait_procs(children, 20)
            for process in left:
                process.kill()
        assert not left, left
