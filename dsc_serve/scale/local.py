"""A whole cluster on this machine: Ray on the loopback address, and the application of a Serve config file."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Ray reads these when it is imported. Loopback becomes the node's address, as it is by default on laptops; what still
# listens everywhere (a replica's internal port) asks for a token that nobody else has.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # Answers pass by gRPC and by one event loop per process: half the processor time per token of Ray's default.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}

import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from dsc_serve.config import ConfigError

OBJECT_STORE_BYTES = 100 * 2**20
START_S = 300.0
LOOK_S = 0.2
ADDRESS = "127.0.0.1"


class LocalStartError(RuntimeError):
    """An application did not come up."""


def load(file: Path) -> ServeDeploySchema:
    """Raises ConfigError."""
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{file} is not a Serve config: {error}") from None
    http = config.http_options
    if "host" in http.model_fields_set and http.host not in (ADDRESS, "localhost"):
        raise ConfigError(
            f"{file}: http_options.host is {http.host!r}; here it must be {ADDRESS}, behind a proxy of yours"
        )
    return config


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Ray on this machine while the block runs, reachable from it alone."""
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace="serve",
    )
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(config: ServeDeploySchema, stop: threading.Event) -> bool:
    """Bring the applications of the cluster to this state, replica by replica. False: `stop` was set before they were
    there. Raises StartError.
    """
    http = config.http_options.model_dump(exclude_unset=True)
    serve.start(proxy_location=config.proxy_location, http_options={"port": 8000, **http, "host": ADDRESS})
    _get_global_client().deploy_apps(config)
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        states = [application.status for application in serve.status().applications.values()]
        if ApplicationStatus.DEPLOY_FAILED in states:
            raise LocalStartError("\n".join(a.message for a in serve.status().applications.values()))
        if len(states) == len(config.applications) and set(states) == {ApplicationStatus.RUNNING}:
            return True
        if stop.wait(LOOK_S):
            return False
    raise LocalStartError(f"the applications did not come up within {START_S:g} s")


def run(file: Path) -> None:
    """Serve what the file says until SIGINT or SIGTERM; SIGHUP reads it again. Raises ConfigError and StartError."""
    reload, stop = threading.Event(), threading.Event()

    def note(number: int, _: FrameType | None) -> None:
        (reload if number == signal.SIGHUP else stop).set()

    config = load(file)
    with cluster():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, note)
        if deploy(config, stop):
            announce(config, file)
        while not stop.wait(LOOK_S):
            if reload.is_set():
                reload.clear()
                update(file, stop)


def update(file: Path, stop: threading.Event) -> None:
    """What cannot be used or does not come up is told; what runs goes on."""
    try:
        config = load(file)
        if deploy(config, stop):
            announce(config, file)
    except (ConfigError, LocalStartError) as error:
        print(f"dsc-serve: {error}", flush=True)


def announce(config: ServeDeploySchema, file: Path) -> None:
    print(f"dsc-serve: http://{ADDRESS}:{config.http_options.port} serves {file}", flush=True)
