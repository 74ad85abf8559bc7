"""From the engine's tokens to the client: one whole answer, or server-sent events as the tokens arrive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from dsc_serve.adapter_choice import FIELD as ADAPTER
from dsc_serve.panics import panics_as_errors
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.server.adapters import refused_by_engine
from dsc_serve.server.admission import shutting_down
from dsc_serve.server.allowance import claim
from dsc_serve.server.answer import Choice, ChoiceUpdate, Reached, ResponseFormatter, encode
from dsc_serve.server.disconnect import client_gone
from dsc_serve.server.errors import (
    CLIENT_CLOSED,
    ApiError,
    engine_down,
    from_parameter,
    internal_error,
    out_of_time,
    without_paths,
)
from dsc_serve.server.middleware import EXCHANGE, Exchange
from dsc_serve.server.service import Service
from dsc_serve.server.tools.reader import AnswerReader
from dsc_serve.worker.client import EngineDiedError, UnreadError
from dsc_serve.worker.messages import Delta

log = logging.getLogger(__name__)

EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Emit = Callable[[Choice, ChoiceUpdate], Awaitable[None]]


class ClientGoneError(Exception):
    """The client has left."""


class Generation(Response):
    """Runs the choices of one HTTP request and answers in the shape of its endpoint.

    An answer begins with the first news, so that what fails before it gets a status of its own. A client that leaves
    ends its choices in the engine. at_once: so many of the choices run at a time (None: all).
    """

    def __init__(
        self,
        service: Service,
        formatter: ResponseFormatter,
        choices: list[Choice],
        *,
        prompt_tokens: int,
        stream: bool,
        at_once: int | None = None,
    ) -> None:
        super().__init__()
        self._at_once = len(choices) if at_once is None else at_once
        self._service = service
        self._formatter = formatter
        self._choices = choices
        self._prompt_tokens = prompt_tokens
        self._stream = stream
        self._arrived = 0.0
        self._begun = False
        self._outcome = CLIENT_CLOSED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError where nothing has been sent yet."""
        exchange: Exchange = scope[EXCHANGE]
        self._arrived = exchange.arrived
        self._scheduling = exchange.scheduling(self._formatter.scheduling)
        self._part = exchange.send
        room, field = (
            self._service.engine.model.capacity.max_tokens,
            self._formatter.names.get("max_tokens", "max_tokens"),
        )
        exchange.lease.reserve(claim(self._choices, self._prompt_tokens, room, exchange.lease.tokens, field))
        self._service.metrics.prompt_tokens += self._prompt_tokens
        answer = asyncio.create_task(self._answer_stream(send) if self._stream else self._answer_whole(send))
        gone = asyncio.create_task(client_gone(receive))
        try:
            # Each ends in time: the engine is watched, and a client that reads too slowly is hung up on.
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when the server, shutting down, cancels this request
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            exchange.lease.charge(self._usage()["total_tokens"])
        exchange.status = self._outcome
        if not answer.cancelled():
            with suppress(ClientGoneError):
                answer.result()

    async def _answer_whole(self, send: Send) -> None:
        entries: list[dict[str, Any]] = [{}] * len(self._choices)

        async def collect(choice: Choice, update: ChoiceUpdate) -> None:
            entries[choice.index] = self._formatter.whole(choice, update)

        await self._follow_all(collect)
        body = encode(self._formatter.answer(entries, self._usage()))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send(send, body, headers, more=False)
        self._outcome = 200

    async def _answer_stream(self, send: Send) -> None:
        writing = asyncio.Lock()

        async def write(choice: Choice, update: ChoiceUpdate) -> None:
            async with writing:
                usage = self._usage() if self._formatter.continuous_usage else None
                if events := self._formatter.events(choice, update, usage):
                    await self._send(send, events, EVENT_STREAM_HEADERS)

        outcome = 200
        try:
            await self._follow_all(write)
            last = self._formatter.last_events(self._usage())
        except ClientGoneError:
            raise
        except ApiError as error:
            if not self._begun:
                raise
            last, outcome = self._formatter.failed_events(error, self._usage()), error.status
        except Exception:
            if self._begun:
                await self._send(send, self._formatter.failed_events(internal_error(), self._usage()), [], more=False)
            raise
        await self._send(send, last, [], more=False)
        self._outcome = outcome

    async def _send(self, send: Send, data: bytes, headers: list[tuple[bytes, bytes]], more: bool = True) -> None:
        """Send a part of the body, and before the first one status 200 and the headers. Raises ClientGoneError."""
        try:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})
        except OSError as error:
            raise ClientGoneError from error

    async def _send_event(self, data: bytes) -> None:
        """Send one whole event of an answer that has begun. Raises ClientGoneError."""
        try:
            await self._part({"type": "http.response.body", "body": data, "more_body": True})
        except OSError as error:
            raise ClientGoneError from error

    async def _follow_all(self, emit: Emit) -> None:
        """Run all choices at once to their ends. The first failure ends them all."""
        if len(self._choices) == 1:
            return await self._follow(self._choices[0], emit)
        permits = asyncio.Semaphore(self._at_once)

        async def follow(choice: Choice) -> None:
            async with permits:
                await self._follow(choice, emit)

        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._choices:
                    group.create_task(follow(choice))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return None

    async def _follow(self, choice: Choice, emit: Emit) -> None:
        """Run one choice to its end, emitting its news: as they come when streaming, else once at the end."""
        try:
            deltas = self._service.engine.generate(
                *(choice.request_id, choice.prompt, choice.params, self._scheduling),
                family=choice.family,
                embedding=choice.embedding,
                adapter=self._formatter.resolved.choice,
            )
            async with aclosing(deltas):
                with panics_as_errors():
                    await self._follow_deltas(choice, deltas, emit)
        except UnreadError as error:
            choice.outcome = "abort"
            raise out_of_time(str(error), "client_too_slow") from error
        except (EngineDiedError, ConnectionError) as error:
            log.error("request %s %s failed: %s", choice.request_id, self._whose, error)
            if self._service.admission.draining:
                raise shutting_down() from error
            raise engine_down(str(error)) from error
        except (asyncio.CancelledError, ClientGoneError):
            choice.outcome = "abort"
            raise
        finally:
            reader = choice.reader
            if reader is not None and reader.calls:
                self._service.metrics.called(self._service.dialect.form.name, reader.calls, reader.malformed)
            self._formatter.ended(choice)

    async def _follow_deltas(self, choice: Choice, deltas: AsyncIterator[Delta], emit: Emit) -> None:
        """Emit what is new of a choice until it ends. Raises ApiError where it fails, or ends without a reason."""
        text, reader = choice.text, choice.reader
        tokens_only = self._service.tokenizer is None
        plain = self._stream and self._formatter.is_plain(choice)
        update = ChoiceUpdate()
        begun = told = False
        async for delta in deltas:
            choice.count(delta)
            reason = delta.finish_reason
            if reason in ("error", "abort") or (reason == "timeout" and not begun):
                raise self._failure(delta)
            self._measure(choice, delta, begun)
            if not begun and choice.echo is not None and (delta.token_ids or reason):
                update.echo(choice.echo, choice.prompt)
            begun = begun or bool(delta.token_ids)
            before = text.token_count
            pieces = [text.push(delta.token_ids)] if reader is None else [text.push((id,)) for id in delta.token_ids]
            if plain and told and reason is None and not text.stopped:
                if pieces[0]:
                    await self._send_event(self._formatter.text_event(choice, pieces[0]))
                continue
            rest = text.finish() if reason is not None else ""
            kept = text.token_count - before
            update.add(delta, kept)
            self._end_at_stop(choice, update, delta)
            if reader is None:
                update.text.append(pieces[0] + rest)
            else:
                self._read(choice, reader, update, pieces[:kept], rest)
            news = delta.token_ids if tokens_only else update.has_news or (reader is not None and not told)
            if update.finish_reason is not None:
                return await emit(choice, update)
            if self._stream and news:
                await emit(choice, update)
                update, told = ChoiceUpdate(), True
        raise engine_failure("the engine ended the request without a reason")

    def _end_at_stop(self, choice: Choice, update: ChoiceUpdate, delta: Delta) -> None:
        """End a choice whose text has come to a stop; let its update say which text, or which token, that was."""
        if choice.text.stopped:
            update.stop_reason = choice.text.stop_text
            self._end(choice, update)
        elif update.finish_reason == "stop" and delta.token_ids and delta.token_ids[-1] in choice.params.stop_token_ids:
            update.stop_reason = delta.token_ids[-1]

    def _read(self, choice: Choice, reader: AnswerReader, update: ChoiceUpdate, pieces: list[str], rest: str) -> None:
        """Make parts of new text, that of each token and the rest; end a choice that may make no more calls."""
        for piece in pieces:
            update.parts += reader.push(piece, 1)
            update.reached.append(Reached(len(update.parts), len(piece), reader.held))
        update.parts += reader.push(rest)
        if reader.done and update.finish_reason is None:
            self._end(choice, update)
        if update.finish_reason is not None:
            update.parts += reader.finish()

    def _end(self, choice: Choice, update: ChoiceUpdate) -> None:
        """Let a choice have stopped, also in the engine where that goes on."""
        if update.finish_reason is None:
            self._service.engine.finish(choice.request_id, "stop")
        choice.outcome = update.finish_reason = "stop"

    def _measure(self, choice: Choice, delta: Delta, begun: bool) -> None:
        """Count a delta's tokens, and how long they took."""
        metrics = self._service.metrics
        passed = choice.clock.record(delta, time.perf_counter() - self._arrived)
        if passed is None:
            return
        if begun:
            metrics.inter_token.observe(passed / len(delta.token_ids))
        else:
            metrics.first_token.observe(passed)
        metrics.generated_tokens += len(delta.token_ids)

    @property
    def _whose(self) -> str:
        label = self._formatter.resolved.label
        return f"(user {self._formatter.user!r}{f', adapter {label!r}' if label else ''})"

    def _failure(self, delta: Delta) -> ApiError:
        if delta.finish_reason == "timeout":
            return out_of_time(delta.error)
        log.error("request %s %s failed: %s", delta.request_id, self._whose, delta.error)
        if delta.error_field == ADAPTER:  # it was there when the request came
            return refused_by_engine(self._formatter.resolved, delta.error, delta.unknown)
        if delta.error_field:
            return from_parameter(ParameterError(delta.error_field, delta.error), self._formatter.names)
        if delta.unavailable or not self._service.engine.alive:
            return engine_down(delta.error)
        return engine_failure(delta.error or f"the engine ended the request: {delta.finish_reason}")

    def _usage(self) -> dict[str, Any]:
        generated = sum(choice.text.token_count for choice in self._choices)
        # A prompt counts once, whatever its number of choices: as its first one found it.
        cached = {id(choice.prompt): choice.cached_tokens for choice in reversed(self._choices)}
        usage: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }
        if any(choice.params.prediction_token_ids for choice in self._choices):
            right, wrong = map(sum, zip(*(choice.predicted for choice in self._choices), strict=True))
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": right,
                "rejected_prediction_tokens": wrong,
            }
        return usage


def engine_failure(message: str) -> ApiError:
    return ApiError(500, without_paths(message), type="server_error", code="engine_error")
