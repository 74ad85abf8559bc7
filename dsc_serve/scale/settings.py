"""The settings of an application on Ray Serve: those of its replicas, and how requests are spread over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta

from dsc_serve.config import ConfigError, Section, ServerConfig, environment
from dsc_serve.settings import SETTINGS, Setting, choose, settings_of, unknown

# Sockets are the business of Ray Serve's own proxy.
NOT_HERE = frozenset({
    "host", "port", "tls_cert", "tls_key", "max_connections", "max_header_bytes", "header_timeout_s", "keep_alive_s",
    "send_timeout_s", "send_buffer_bytes",
})  # fmt: skip


class ScaleConfig(Section, frozen=True, kw_only=True):
    """How requests are spread over replicas."""

    routing: Annotated[
        Literal["affinity", "round-robin"],
        Meta(description="Where a request goes: where its prompt's beginning was computed, or to each in turn."),
    ] = "affinity"
    load_factor: Annotated[
        float,
        Meta(ge=1, description="Affinity yields where a replica has so many times the mean of requests in flight."),
    ] = 1.25
    load_slack: Annotated[int, Meta(ge=1, description="But never below so many requests in flight.")] = 8
    door_waiting: Annotated[
        int,
        Meta(ge=1, description="Requests that wait at a door for a replica with room; beyond them clients get 429."),
    ] = 512
    take_s: Annotated[
        float, Meta(ge=0.1, description="Seconds that a request waits for a replica with room; then it gets 503.")
    ] = 60.0


SCALE_SETTINGS: dict[str, Setting] = {setting.name: setting for setting in settings_of("scale", ScaleConfig)}


def read(args: Mapping[str, Any]) -> tuple[ServerConfig, ScaleConfig]:
    """The settings in the `args` of a Serve config file, and in this program's variables. Raises ConfigError."""
    scale, server = {}, {}
    known = {*SCALE_SETTINGS, *(SETTINGS.keys() - NOT_HERE)}
    for name, value in args.items():
        if name in SCALE_SETTINGS:
            scale[name] = SCALE_SETTINGS[name].read(value, "args")
        elif name in NOT_HERE:
            raise ConfigError(f"args: {name} is not for replicas; see http_options of the Serve config")
        elif name not in known:
            unknown(name, "args", "a setting", known)
        else:
            server[name] = value
    chosen = choose(None, environment(), server, "args")
    return chosen.config(), ScaleConfig(**scale)
