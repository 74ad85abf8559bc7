"""The edge of the app: what every HTTP request passes through, whatever it asks for."""

from __future__ import annotations

import contextvars
import logging
import re
import time
from collections.abc import Set
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsc_serve.panics import is_panic
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.server.adapters import ResolvedModel
from dsc_serve.server.admission import GENERATIONS, Admission, Lease
from dsc_serve.server.errors import CLIENT_CLOSED, ApiError, internal_error
from dsc_serve.server.keys import Key, KeyRing
from dsc_serve.server.metrics.requests import Metrics

log = logging.getLogger("dsc_serve.requests")

HEALTH = frozenset({"/health", "/health/live", "/health/ready"})
ENDPOINTS = HEALTH | GENERATIONS | {"/", "/v1/models", "/metrics", "/tokenize", "/detokenize", "/version"}
MODEL_PREFIX, ADMIN_PREFIX, PAGE_PREFIX = "/v1/models/", "/admin/", "/page/"
REQUEST_ID = "x-request-id"
USABLE_ID = re.compile(r"[!-~]{1,128}")
EXCHANGE = "dsc_serve.exchange"

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


class Paths:
    """The ASGI layer that takes a path that ends with a slash for the same one without it.

    root_path: the path of this app behind a proxy; a proxy may leave it on what it passes on, or take it off.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if self.root_path and (path == self.root_path or path.startswith(self.root_path + "/")):
                path = path.removeprefix(self.root_path) or "/"
            if path.endswith("/"):
                path = path.rstrip("/") or "/"
            if self.root_path or path != scope["path"]:
                scope = {**scope, "path": path, "root_path": self.root_path}
        await self.app(scope, receive, send)


class Exchange:
    """One HTTP request, from its arrival (in perf_counter seconds) to the end of its answer.

    status is what the client got; key is whose it is, None where none is needed; lease holds its places; resolved
    is the model that it means, once that is known. send is the server's own: parts of a body may take it past the
    layers of the app, which look at an answer's beginning only.
    """

    def __init__(self, path: str, admission: Admission, send: Send) -> None:
        # Unknown paths share one label: clients must not be able to create series.
        prefixes = {"/v1/models/{id}": MODEL_PREFIX, "/admin": ADMIN_PREFIX, "/page": PAGE_PREFIX}
        known = next((name for name, prefix in prefixes.items() if path.startswith(prefix)), "other")
        self.endpoint = path if path in ENDPOINTS else known
        self.send = send
        self.arrived = time.perf_counter()
        self.status = CLIENT_CLOSED
        self.key: Key | None = None
        self.lease = Lease(admission.permits, None)
        self.resolved: ResolvedModel | None = None

    def scheduling(self, asked: SchedulingParams) -> SchedulingParams:
        return asked if self.key is None else self.key.scheduling(asked)


class RequestLogMiddleware:
    """The ASGI layer that names, counts and logs every HTTP request once, and takes back what it holds at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics, admission: Admission, log_requests: bool) -> None:
        self.app, self.metrics, self.admission = app, metrics, admission
        self.log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        name = given if USABLE_ID.fullmatch(given) else uuid4().hex
        exchange = scope[EXCHANGE] = Exchange(scope["path"], self.admission, send)
        request_id.set(name)
        begun = False

        async def observed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                exchange.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        asked_for_head = scope["method"] == "HEAD"  # the connection leaves out the body
        try:
            await self.app({**scope, "method": "GET"} if asked_for_head else scope, receive, observed)
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            exchange.status = 500
            if begun:
                raise
            log.exception("the server failed on a request")
            await internal_error().response()(scope, receive, observed)
        finally:
            exchange.lease.release()
            self._record(scope, exchange)

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        duration = time.perf_counter() - exchange.arrived
        self.metrics.request_ended(exchange.endpoint, exchange.status, duration)
        if self.log_requests:
            facts = {
                "method": scope["method"],
                "path": scope["path"],
                "status": exchange.status,
                "duration_ms": round(duration * 1e3, 2),
                "key": "" if exchange.key is None else exchange.key.name,
                "adapter": "" if exchange.resolved is None else exchange.resolved.label,
            }
            log.info("request", extra={"facts": facts})


class AuthMiddleware:
    """The ASGI layer that lets a request in only with a key where one is needed, and a generation where one has room.

    Both are told before the body is read. keyless: paths that nobody needs a key for.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, admission: Admission, keyless: Set[str]) -> None:
        self.app, self.ring, self.admission, self.keyless = app, ring, admission, keyless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError."""
        exchange: Exchange = scope[EXCHANGE]
        path = scope["path"]
        admin = path.startswith(ADMIN_PREFIX)
        if admin or (self.ring.required and path not in self.keyless):
            exchange.key = self._key(Headers(scope=scope).get("authorization", ""))
            exchange.lease = self.admission.lease(exchange.key)
            if admin and not exchange.key.admin:
                raise ApiError(403, f"the key {exchange.key.name!r} is not an administrator's", code="not_allowed")
        if exchange.endpoint in GENERATIONS and scope["method"] == "POST":
            self.admission.check_open()

    def _key(self, header: str) -> Key:
        """Raises ApiError (401)."""
        scheme, _, token = header.partition(" ")
        key = self.ring.find(token.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        if key is None:
            what = "the API key is not known here" if header else "there is no API key"
            message = f"{what}; send one as the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return key
