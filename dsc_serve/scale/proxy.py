"""The one endpoint in front of the replicas: hands every request to one of them and its answer back as it comes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from dsc_serve.config import ServerConfig
from dsc_serve.scale.call import AnswerPart, Call, Headers
from dsc_serve.scale.scrape import merged
from dsc_serve.scale.settings import ScaleConfig
from dsc_serve.server import errors
from dsc_serve.server.admission import GENERATIONS, too_many
from dsc_serve.server.answer import DONE, event
from dsc_serve.server.disconnect import client_gone
from dsc_serve.server.errors import ApiError, engine_down, internal_error
from dsc_serve.server.limits import read_body
from dsc_serve.server.middleware import HEALTH, REQUEST_ID, Paths

MAX_TRIES = 2  # a request that two replicas died with may be what kills them
ALL_S = 5.0
BY_REPLICA = frozenset({"/admin/state", "/admin/tenants"})
ASKED_OF_ALL = HEALTH | {"/metrics"} | BY_REPLICA
REPLICA = b"x-dsc-replica"
POSTED = GENERATIONS | {"/tokenize", "/detokenize"}


class Proxy:
    """Any number of them may stand side by side: each counts its own requests. No torch in its process."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig, scale: ScaleConfig) -> None:
        self._replicas, self._config = replicas, config
        self._queue = ProxyQueue(scale.door_waiting, scale.take_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.state.config, app.state.reading = self._config, Counter()
        errors.install(app)
        app.add_middleware(Paths, root_path=self._config.root_path)
        app.add_route("/{path:path}", self.pass_on, ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
        return app

    async def pass_on(self, request: Request) -> Response:
        body = await read_body(request) if request.method == "POST" and request.scope["path"] in POSTED else b""
        call = Call.of(request, body)
        if call.method == "GET" and call.path in ASKED_OF_ALL:
            return await self.ask_all(call)
        return ProxiedResponse(self._replicas.options(stream=True), call, self._queue)

    async def ask_all(self, call: Call) -> Response:
        """One answer out of those of all replicas that answer in time. Raises ApiError (503) when none does."""
        try:
            answers = await self._replicas.broadcast("whole", call).results_async(
                timeout_s=ALL_S, return_exceptions=True
            )
        except (RayError, DeploymentUnavailableError, TimeoutError):
            answers = []
        parts: dict[str, AnswerPart] = dict(answer for answer in answers if not isinstance(answer, BaseException))
        if not parts:
            raise engine_down("no replica answers")
        well = {name: part for name, part in parts.items() if part.status == 200}
        first = next(iter(well.values()), next(iter(parts.values())))
        bodies = {name: part.body for name, part in well.items()}
        if well and call.path == "/metrics":
            return Response(merged(bodies), headers=headers_of(first))
        if well and call.path in BY_REPLICA:
            states = {name: msgspec.Raw(body) for name, body in bodies.items()}
            return errors.json_response({"replicas": states})
        return Response(first.body, first.status, headers=headers_of(first))


class ProxyQueue:
    """The requests of a door that no replica has taken yet."""

    def __init__(self, most: int, limit_s: float) -> None:
        self._most, self._limit_s = most, limit_s
        self._waiting = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait in the queue while the block runs. Raises ApiError: 429 where it is full, 503 after too long."""
        if self._waiting >= self._most:
            raise too_many(f"no replica has room, and {self._waiting} requests wait for one", "queue_full")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limit_s):
                yield
        except TimeoutError:
            raise engine_down(f"no replica had room within {self._limit_s:g} s") from None
        finally:
            self._waiting -= 1


class ProxiedResponse(Response):
    """One request through one replica. A replica that dies with a request that it has not begun to answer has it
    taken over by another; an answer that has begun ends with an error event."""

    def __init__(self, replicas: DeploymentHandle, call: Call, queue: ProxyQueue) -> None:
        super().__init__()
        self._replicas, self._call, self._queue = replicas, call, queue
        self._begun = self._streams = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.create_task(self._answer(send))
        gone = asyncio.create_task(client_gone(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        if not answer.cancelled():
            answer.result()

    async def _answer(self, send: Send) -> None:
        """Raises ApiError where nothing has been sent yet."""
        try:
            await self._ask(send)
        except ApiError as error:
            if not self._streams:
                raise
            await send({"type": "http.response.body", "body": event(error.body) + DONE, "more_body": False})

    async def _ask(self, send: Send) -> None:
        """Raises ApiError."""
        for remaining in reversed(range(MAX_TRIES)):
            parts = self._replicas.answer.remote(self._call)
            try:
                async with self._queue.slot():
                    taken = await anext(parts)
                async for part in parts:
                    await self._send(part, taken.replica, send)
                return
            except DeploymentUnavailableError:
                raise engine_down("no replica can be started") from None
            except RayActorError:
                if self._begun or not remaining:
                    raise engine_down("the replica that served this request has died") from None
            except RayError as error:
                raise internal_error() from error
            finally:
                parts.cancel()

    async def _send(self, part: AnswerPart, replica: str, send: Send) -> None:
        if part.headers is not None:
            self._begun = True
            self._streams = any(value.startswith(b"text/event-stream") for _, value in part.headers)
            headers = [*plain(part.headers), (REPLICA, replica.encode())]
            await send({"type": "http.response.start", "status": part.status, "headers": headers})
        await send({"type": "http.response.body", "body": part.body, "more_body": not part.last})


def plain(headers: Headers) -> Headers:
    """Without the request's id, which Ray Serve's proxy adds to every answer."""
    return [(name, value) for name, value in headers if name != REQUEST_ID.encode()]


def headers_of(part: AnswerPart) -> dict[str, str]:
    pairs = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in plain(part.headers or []))
    return {name: value for name, value in pairs if name != "content-length"}
