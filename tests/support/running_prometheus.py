"""A real Prometheus with the configuration of deploy/prometheus, that looks more often and at another server."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from support.programs import program

START_LIMIT_S = 60


@dataclass
class RunningPrometheus:
    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expr: str) -> list[float]:
        """The values of all series now."""
        return [float(series["value"][1]) for series in self.get("query", query=expr)["result"]]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def wait_until(self, condition: Callable[[], object], limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not reached within {limit_s} s"
            time.sleep(0.5)


def start_prometheus(folder: Path, target: str, out: Path) -> RunningPrometheus:
    """folder: deploy/prometheus; target: host and port of the server."""
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / name) for name in config["rule_files"]]
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "dsc-serve")
    config["scrape_configs"] = [job]
    job["static_configs"] = [{"targets": [target]}]
    (out / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(program("prometheus"), f"--config.file={out / 'prometheus.yml'}", f"--storage.tsdb.path={out / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(out / "log").open("wb"))
    running = RunningPrometheus(f"http://127.0.0.1:{port}", process)

    def ready() -> bool:
        assert process.poll() is None, (out / "log").read_text()
        try:
            return httpx.get(f"{running.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    running.wait_until(ready, START_LIMIT_S)
    return running


def stop_prometheus(running: RunningPrometheus) -> None:
    running.process.terminate()
    running.process.wait(30)
