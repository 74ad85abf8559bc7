"""Typed settings of how the server's processes live, and of what they log."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from dsc_serve.section import ConfigError, Section

LONGEST_S = 7 * 24 * 3600


class LifeConfig(Section, frozen=True, kw_only=True):
    """How the engine is started, watched, restarted and ended."""

    start_timeout_s: Annotated[
        float, Meta(ge=1, le=LONGEST_S, description="Seconds for the engine to load its model.")
    ] = 300.0
    ping_s: Annotated[float, Meta(ge=0.05, le=3600, description="Seconds between looks at the engine.")] = 1.0
    stall_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=LONGEST_S,
            description="Not ready when the engine has not answered, or not completed a step, for so long.",
        ),
    ] = 5.0
    hang_s: Annotated[
        float, Meta(ge=0.1, le=LONGEST_S, description="The engine is killed and restarted after so long.")
    ] = 30.0
    max_restarts: Annotated[
        int,
        Meta(ge=0, le=1000, description="Restarts of the engine within restart_window_s; then the server gives up."),
    ] = 5
    restart_window_s: Annotated[float, Meta(ge=1, le=LONGEST_S, description="See max_restarts.")] = 300.0
    drain_s: Annotated[
        float,
        Meta(
            ge=0,
            le=LONGEST_S,
            description="Seconds that running requests have to finish once the server is told to stop.",
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hang_s < self.stall_s:
            raise ConfigError(f"hang_s is {self.hang_s} but stall_s is {self.stall_s}; it must be at least that")


class LogConfig(Section, frozen=True, kw_only=True):
    """What the API process logs, and where; the engine's few warnings are plain lines on standard error."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least level logged.")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="Lines for people, or one JSON object a line.")] = (
        "text"
    )
    log_file: Annotated[str, Meta(description="Append to this file instead of standard error.")] = ""
    log_requests: Annotated[bool, Meta(description="Log every HTTP request when it has ended.")] = False
    log_prompts: Annotated[bool, Meta(description="Log what clients send to the model, which is private.")] = False
