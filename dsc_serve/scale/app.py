"""The Ray Serve application: doors in front of replicas. A Serve config file names `dsc_serve.scale.app:build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from dsc_serve.config import ServerConfig, generation_slots
from dsc_serve.scale.proxy import Proxy
from dsc_serve.scale.replica import Replica
from dsc_serve.scale.settings import ScaleConfig, read
from dsc_serve.worker.supervisor import ENGINE

ROUTERS = {
    "affinity": "dsc_serve.scale.replica_router.PrefixRouter",
    "round-robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
}
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # the server has a log of its own
MAX_AT_DOOR = 10_000
STOP_S = 15.0  # for the engine to end, after the last request


def build(args: dict[str, Any]) -> Application:
    """The application with these settings, as `read` reads them. Raises ConfigError."""
    config, scale = read(args)
    return application(config, scale)


def application(config: ServerConfig, scale: ScaleConfig, command: Sequence[str] = ENGINE) -> Application:
    """Doors and replicas; a Serve config file may change the options of both. command: as in EngineSupervisor."""
    room = generation_slots(config)
    limit_s = config.life.drain_s + STOP_S
    kwargs = {"factor": scale.load_factor, "slack": scale.load_slack} if scale.routing == "affinity" else {}
    replicas = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=room,
        graceful_shutdown_timeout_s=limit_s,
        max_constructor_retry_count=3,
        logging_config=QUIET,
        ray_actor_options={"num_gpus": 1} if config.engine.device == "cuda" else {},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTERS[scale.routing], request_router_kwargs=kwargs
        ),
    )
    doors = serve.deployment(
        serve.ingress()(Proxy),
        name="door",
        max_ongoing_requests=MAX_AT_DOOR,
        graceful_shutdown_timeout_s=limit_s + scale.take_s,
        logging_config=QUIET,
        ray_actor_options={"num_cpus": 0},
    )
    return doors.bind(replicas.bind(config, tuple(command)), config, scale)
