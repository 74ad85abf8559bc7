"""The HTTP application."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from dsc_serve import __version__
from dsc_serve.adapter_choice import AdapterInfo
from dsc_serve.config import ServerConfig, generation_slots
from dsc_serve.server import errors, page
from dsc_serve.server.admission import SHUTTING_DOWN, Admission, Permits
from dsc_serve.server.chat import create_chat_completion
from dsc_serve.server.completions import create_completion
from dsc_serve.server.embeddings import create_embeddings
from dsc_serve.server.errors import engine_down, json_response
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.middleware import EXCHANGE, HEALTH, REQUEST_ID, AuthMiddleware, Paths, RequestLogMiddleware
from dsc_serve.server.openapi import describe
from dsc_serve.server.responses.endpoint import create_response
from dsc_serve.server.service import EngineHandle, Service
from dsc_serve.server.tokens import detokenize, tokenize
from dsc_serve.server.trace import create_trace
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.client import EngineDiedError


def served_names(config: ServerConfig) -> tuple[str, ...]:
    """What clients call the model: as configured, else the name of its folder, or of its file without `.gguf`."""
    return config.served_names or (Path(config.engine.model).resolve().name.removesuffix(".gguf"),)


def create_app(
    config: ServerConfig, client: EngineHandle, tokenizer: Tokenizer | None, ring: KeyRing | None = None
) -> FastAPI:
    """The application around a running engine; `ring` holds the API keys (None: nobody needs one)."""
    ring = ring or KeyRing("", "")
    admission = Admission(Permits(generation_slots(config)), config.limits)
    service = Service(
        client,
        tokenizer,
        served_names(config),
        admission,
        config.limits,
        config.tool_calls,
        config.escape_special_tokens,
    )
    service.metrics.ring = ring
    app = FastAPI(title="dsc-serve", version=__version__, redirect_slashes=False)
    app.state.service, app.state.config, app.state.reading = service, config, Counter()
    app.add_middleware(AuthMiddleware, ring=ring, admission=admission, keyless=keyless(config))
    if config.access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.access.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    app.add_middleware(
        RequestLogMiddleware, metrics=service.metrics, admission=admission, log_requests=config.log.log_requests
    )
    app.add_middleware(
        Paths, root_path=config.root_path
    )  # the outermost: what is counted, let in and answered is one path
    errors.install(app)
    if config.page:
        page.install(app, config.root_path)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await create_embeddings(service, request)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await create_response(service, request)

    @app.post("/v1/dsc/trace")
    async def trace(request: Request) -> Response:
        return await create_trace(service, request)

    @app.post("/tokenize")
    async def to_tokens(request: Request) -> Response:
        return await tokenize(service, request)

    @app.post("/detokenize")
    async def to_text(request: Request) -> Response:
        return await detokenize(service, request)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        key = request.scope[EXCHANGE].key
        cards = [model_card(service, name) for name in service.names if service.catalogue.shows_base(key)]
        cards += [adapter_card(service, info) for info in await service.catalogue.visible(key)]
        return json_response({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        key, catalogue = request.scope[EXCHANGE].key, service.catalogue
        if name in service.names and catalogue.shows_base(key):
            return json_response(model_card(service, name))
        info = await catalogue.find(name, "model", key)
        return json_response({**adapter_card(service, info), "id": name})

    def trouble() -> str:
        """Why the server is not ready, "" when it is."""
        return client.trouble or (SHUTTING_DOWN if admission.draining else "")

    @app.get("/health/live")
    async def live() -> Response:
        if client.gave_up:
            raise engine_down(client.trouble)
        return json_response({"status": "ok"})

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Response:
        if trouble():
            raise engine_down(trouble())
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        body = await service.metrics.scrape(ready=not trouble())
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    @app.get("/admin/state")
    async def state() -> Response:
        engine = {"alive": client.alive, "trouble": client.trouble, "restarts": client.restarts}
        return json_response({"engine": engine, **admission.state()})

    @app.get("/admin/tenants")
    async def tenants() -> Response:
        try:
            report = await client.tenants()
        except (TimeoutError, EngineDiedError, ConnectionError) as error:
            raise engine_down(client.trouble or "the engine does not answer") from error
        return json_response(msgspec.to_builtins(report))

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, config.root_path)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's documented way
    return app


def keyless(config: ServerConfig) -> frozenset[str]:
    """The paths that are open to all."""
    metrics = frozenset() if config.access.metrics_key else frozenset({"/metrics"})
    return HEALTH | metrics | (page.paths() if config.page else frozenset())


def model_card(service: Service, name: str) -> dict[str, Any]:
    limits = service.engine.model.capacity
    layers, rows, picked = len(limits.picking), limits.pickable, limits.picks_per_token
    dsc = {"layers": layers, "atoms": rows, "atoms_per_token": picked}
    picks = {"of": limits.picks, "layers": list(limits.picking), "number": rows, "per_token": picked}
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "dsc-serve",
        "parent": None,
        "root": name,
        "max_model_len": limits.max_tokens,
        "tool_calls": service.dialect.form.name,
        "reasoning": service.dialect.reasoning is not None,
        "dsc": dsc if limits.picks == "atoms" else None,
        "picks": picks if limits.picks else None,
        "adapter": None,
    }


def adapter_card(service: Service, info: AdapterInfo) -> dict[str, Any]:
    own = {
        "kind": info.kind or None,
        "rank": info.rank,
        "modules": info.modules,
        "bytes": info.nbytes,
        "basis": info.basis or None,
        "loaded": info.loaded,
        "error": info.error or None,
    }
    card = model_card(service, service.model_name)
    return {**card, "id": info.name, "parent": service.model_name, "root": info.digest or None, "adapter": own}
