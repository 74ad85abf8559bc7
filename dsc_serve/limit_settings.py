"""Typed settings of what the server lets in."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from dsc_serve.life_settings import LONGEST_S
from dsc_serve.sampling_params import MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS
from dsc_serve.section import MOST, Section


class LimitConfig(Section, frozen=True, kw_only=True):
    """What the server lets in."""

    max_waiting: Annotated[
        int,
        Meta(
            ge=0, le=2**20, description="Requests that may queue; beyond them clients get 429. 0: as many as may run."
        ),
    ] = 0
    max_connections: Annotated[
        int, Meta(ge=0, le=2**20, description="Open connections; more are closed at once. 0: what open files allow.")
    ] = 0
    max_requests_per_connection: Annotated[
        int,
        Meta(ge=0, le=MOST, description="Requests on one connection, which then ends with the answer; 0: no limit."),
    ] = 1000
    max_header_bytes: Annotated[int, Meta(ge=1024, le=2**24, description="Largest request line and headers.")] = 2**16
    max_body_bytes: Annotated[int, Meta(ge=1024, le=2**30, description="Largest body; beyond it clients get 413.")] = (
        8 * 2**20
    )
    max_body_values: Annotated[
        int,
        Meta(
            ge=1024,
            le=2**30,
            description="Most values in a body; a quarter of them may be texts, an eighth lists and objects.",
        ),
    ] = 2**20
    header_timeout_s: Annotated[
        float, Meta(ge=0.1, le=LONGEST_S, description="Seconds for a request's headers to arrive.")
    ] = 20.0
    body_timeout_s: Annotated[
        float, Meta(ge=0.1, le=LONGEST_S, description="Seconds for a request's body to arrive.")
    ] = 60.0
    keep_alive_s: Annotated[int, Meta(ge=1, le=LONGEST_S, description="Seconds that a connection may idle.")] = 30
    send_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=LONGEST_S,
            description="Seconds in which a client must read 48 KiB, or all; else it is hung up on.",
        ),
    ] = 30.0
    send_buffer_bytes: Annotated[
        int,
        Meta(ge=4096, le=2**28, description="Bytes that the system may hold for a connection that reads too slowly."),
    ] = 2**18
    max_unread: Annotated[
        int, Meta(ge=1, le=2**20, description="Steps' news that may wait for a slow reader; then its request is ended.")
    ] = 4096
    max_prompt_tokens: Annotated[int, Meta(ge=0, le=MOST, description="Longest prompt; 0: what the context holds.")] = 0
    max_output_tokens: Annotated[
        int, Meta(ge=0, le=MOST, description="Largest max_tokens; 0: what the context holds.")
    ] = 0
    max_choices: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Largest n.")] = MAX_CHOICES
    max_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS, description="Most alternatives per token.")] = MAX_LOGPROBS
    max_stops: Annotated[int, Meta(ge=0, le=MAX_STOPS, description="Most stop texts.")] = MAX_STOPS
    streams_per_key: Annotated[
        int, Meta(ge=0, le=MOST, description="Generations at a time for a key that says nothing else; 0: no limit.")
    ] = 0
    requests_per_minute: Annotated[
        int, Meta(ge=0, le=MOST, description="Generations a minute for a key that says nothing else; 0: no limit.")
    ] = 0
    tokens_per_minute: Annotated[
        int, Meta(ge=0, le=MOST, description="Prompt and output tokens a minute for such a key; 0: no limit.")
    ] = 0
