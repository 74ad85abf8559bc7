"""One measured request: what is sent, and what its event stream says and when."""

from __future__ import annotations

import asyncio
import itertools
import time

import msgspec

from dsc_serve.bench.load.connection import Connections, DisconnectError, EventReader, ProtocolError

MAX_ERROR_BODY = 64 * 2**10


class StreamedChoice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None


class StreamedUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class StreamedEvent(msgspec.Struct):
    """One event of a streamed completion; fields that are not measured are left unread."""

    choices: list[StreamedChoice] = []
    usage: StreamedUsage | None = None
    error: object = None


event_decoder = msgspec.json.Decoder(StreamedEvent)


class RequestOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request. Times in seconds, from the moment it was due."""

    failure: str | None = None  # None, or the reason in a few fixed words
    detail: str = ""  # one example of what was said of a failure
    due: float = 0.0  # that moment, by time.perf_counter
    queued: float = 0.0  # until the request was sent, spent in this client
    ttft: float = 0.0  # to the first event with a token
    latency: float = 0.0  # to the last event of the generation, or to the end of an answer that is not a success
    gaps: tuple[float, ...] = ()  # between events with tokens
    input_tokens: int = 0
    output_tokens: int = 0  # as the server counts them, or else the number of events with tokens
    counted: bool = True  # whether the server did

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there was no second one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class StreamRecord:
    """Follows one event stream as its bytes arrive."""

    def __init__(self) -> None:
        self.error = ""
        self.done = False
        self.usage: StreamedUsage | None = None
        self.token_times: list[float] = []
        self.last_choice = 0.0
        self._reader = EventReader()
        self.start_of_body = b""

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        if not self.token_times and len(self.start_of_body) < MAX_ERROR_BODY:
            self.start_of_body += body
        for data in self._reader.feed(body):
            if data == b"[DONE]":
                self.done = True
                continue
            try:
                event = event_decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ProtocolError(f"an event is not a completion: {error}") from error
            if event.error is not None:
                self.error = error_message(event.error) or "no message"
            if event.usage is not None:
                self.usage = event.usage
            for choice in event.choices:
                self.last_choice = now
                if choice.text or choice.token_ids:
                    self.token_times.append(now)

    def outcome(self, due: float) -> RequestOutcome:
        """The measured request, once its answer is whole and its status was 200."""
        if self.error:
            return RequestOutcome(failure="error event", detail=self.error)
        if not self.done:
            return RequestOutcome(failure="incomplete stream", detail="the answer ended without [DONE]")
        if not self.token_times:
            return RequestOutcome(failure="no tokens", detail="no event carried text or token_ids")
        times = self.token_times
        counted = self.usage is not None and self.usage.completion_tokens > 0
        return RequestOutcome(
            ttft=times[0] - due,
            latency=self.last_choice - due,
            gaps=tuple(after - before for before, after in itertools.pairwise(times)),
            input_tokens=self.usage.prompt_tokens if self.usage else 0,
            output_tokens=self.usage.completion_tokens if self.usage and counted else len(times),
            counted=counted,
        )


def error_message(value: object) -> str:
    """The text in an error of the usual forms: {"error": {"message": …}}, {"detail": …}, or a text."""
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return " ".join(str(value).split())[:300]


def error_body(body: bytes) -> str:
    """The text in the body of an answer that reports an error, JSON or not."""
    try:
        return error_message(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return error_message(body.decode("utf-8", "replace"))


async def measure_request(connections: Connections, request: bytes, due: float, timeout_s: float) -> RequestOutcome:
    """Send one streaming request and follow it to its end. Never raises for what the server or the network does."""
    sent = time.perf_counter()
    outcome = await follow(connections, request, due, timeout_s)
    return msgspec.structs.replace(outcome, due=due, queued=sent - due)


async def follow(connections: Connections, request: bytes, due: float, timeout_s: float) -> RequestOutcome:
    record = StreamRecord()
    try:
        async with asyncio.timeout(timeout_s):
            status = await connections.exchange(request, record.on_body)
    except TimeoutError:
        return RequestOutcome(failure="timeout", detail=f"no end within {timeout_s:g} s")
    except DisconnectError as error:
        # A server that closes the connection after its last event has said everything.
        return record.outcome(due) if record.done else RequestOutcome(failure="disconnect", detail=str(error))
    except ProtocolError as error:
        return RequestOutcome(failure="malformed answer", detail=str(error))
    except OSError as error:
        return RequestOutcome(failure="cannot connect", detail=str(error))
    if status != 200:
        latency = time.perf_counter() - due
        return RequestOutcome(failure=f"HTTP {status}", detail=error_body(record.start_of_body), latency=latency)
    return record.outcome(due)
