"""The HTTP application, and the command that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from dsc_serve import __version__
from dsc_serve.config import ConfigError, ServerConfig, resolve_model
from dsc_serve.server import errors
from dsc_serve.server.chat import create_chat_completion
from dsc_serve.server.completions import create_completion
from dsc_serve.server.errors import json_response
from dsc_serve.server.limits import Permits
from dsc_serve.server.metrics import Edge
from dsc_serve.server.schema import ChatRequest, CompletionRequest
from dsc_serve.server.service import Engine, Service
from dsc_serve.server.stream import engine_down
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.client import EngineDiedError
from dsc_serve.worker.messages import ModelInfo
from dsc_serve.worker.supervisor import EngineSupervisor

GRACE_S = 10
KEEP_ALIVE_S = 30
STATS_TIMEOUT_S = 1.0
HEALTH_TIMEOUT_S = 5.0  # longer than the longest step
REQUEST_BODIES = (CompletionRequest, ChatRequest)


def served_name(config: ServerConfig) -> str:
    """What clients call the model: as configured, else the name of its folder."""
    return config.served_model_name or Path(config.engine.model).resolve().name


def create_app(config: ServerConfig, client: Engine, tokenizer: Tokenizer | None) -> FastAPI:
    """The application around a running engine. It reads of `config` the names and limits, not the address."""
    permits = Permits(config.limits.max_waiting + config.engine.max_running)
    service = Service(client, tokenizer, served_name(config), permits)
    app = FastAPI(title="dsc-serve", version=__version__, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(Edge, metrics=service.metrics)
    errors.install(app)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(model_card(service))

    @app.get("/health")
    async def health() -> Response:
        try:
            await client.stats(HEALTH_TIMEOUT_S)
        except TimeoutError:
            raise engine_down(f"the engine has not answered for {HEALTH_TIMEOUT_S:g} s") from None
        except (EngineDiedError, ConnectionError):
            raise engine_down("the engine process has ended") from None
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            stats = await client.stats(STATS_TIMEOUT_S)
        except (TimeoutError, EngineDiedError, ConnectionError):
            stats = None
        body = service.metrics.render(stats, client.alive, permits.held)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's documented way
    return app


def model_card(service: Service) -> dict[str, Any]:
    limits = service.engine.model.limits
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "dsc-serve",
        "max_model_len": limits.max_tokens,
    }


def body_of(model: type[CompletionRequest] | type[ChatRequest]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. The framework does not know the bodies, since it does not read them."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in REQUEST_BODIES:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    return document


def serve(config: ServerConfig) -> None:
    """Serve until SIGINT or SIGTERM, then stop the engine. Prints the address and how to try it.

    Raises ConfigError, TokenizerError or EngineStartError when it cannot start.
    """
    tokenizer = Tokenizer.load(resolve_model(config.engine.model))
    # Bound first: an address that is taken should not cost the time of loading a model.
    with bind(config.host, config.port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_server(config, listener, tokenizer))


async def run_server(config: ServerConfig, listener: socket.socket, tokenizer: Tokenizer | None) -> None:
    supervisor = EngineSupervisor(config.engine, config.life.start_timeout_s)
    starting = asyncio.create_task(supervisor.start())
    server: Server | None = None
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        starting.cancel()
        if server is not None:
            server.should_exit = True
            server.force_exit = asked > 1  # do not wait for requests any more

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await asyncio.wait((starting,))  # the supervisor limits it
        if asked:
            return
        client = starting.result()
        app = create_app(config, client, tokenizer)
        text = announcement(config, listener, client.model, tokenizer is not None)
        server = Server(app, lambda: print(text, flush=True))
        await server.serve(sockets=[listener])
    finally:
        starting.cancel()
        await supervisor.stop()


class Server(uvicorn.Server):
    """Says when it listens, and leaves signals to its caller, which has an engine to stop as well."""

    def __init__(self, app: FastAPI, on_listening: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                workers=1,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ConfigError."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"host {host!r} with port {port} cannot be listened on: {error.strerror or error}") from error
    return listener


def announcement(config: ServerConfig, listener: socket.socket, model: ModelInfo, has_tokenizer: bool) -> str:
    """Where the server is and what it serves, and a command to try it."""
    port = listener.getsockname()[1]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    here, there = (
        f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in (config.host, reachable)
    )
    prompt: object = "Once upon a time" if has_tokenizer else list(range(min(3, model.limits.vocab_size)))
    body = json.dumps({"prompt": prompt, "max_tokens": 32})
    return (
        f"dsc-serve: {here} serves {served_name(config)}, {model.total_parameters / 1e6:.1f} M parameters, "
        f"{model.active_parameters / 1e6:.1f} M active (kernels: {model.kernels}; {model.dtype}, {model.device}, "
        f"{model.threads} threads)\n"
        f"curl {there}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    )
