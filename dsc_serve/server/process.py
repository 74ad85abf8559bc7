"""The server as a process: it listens, runs the engine, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn
import uvloop
from fastapi import FastAPI

from dsc_serve.config import ConfigError, ServerConfig, resolve_model
from dsc_serve.server.admission import SHUTTING_DOWN
from dsc_serve.server.app import create_app, served_name
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.logs import logging_to
from dsc_serve.server.protocol import HttpConnection
from dsc_serve.server.service import Service
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.messages import ModelInfo
from dsc_serve.worker.supervisor import EngineSupervisor

log = logging.getLogger(__name__)

CLOSE_S = 2  # for answers that are complete to reach their clients when the server ends
RESERVED_FILES = 64  # for all that is not a connection


def serve(config: ServerConfig) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then stop the engine. Prints the address and how to try it.

    Raises ConfigError, TokenizerError or EngineStartError when it cannot start.
    """
    ring = KeyRing.of(config)
    check_tls(config)
    tokenizer = Tokenizer.load(resolve_model(config.engine.model))
    raise_file_limit()
    # Bound first: an address that is taken should not cost the time of loading a model.
    with (
        bind(config.host, config.port, config.limits.send_buffer_bytes) as listener,
        logging_to(config.log),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(run_server(config, listener, tokenizer, ring))


async def run_server(config: ServerConfig, listener: socket.socket, tokenizer: Tokenizer | None, ring: KeyRing) -> None:
    supervisor = EngineSupervisor(config.engine, config.life, config.limits.max_unread)
    starting = asyncio.create_task(supervisor.start())
    asked = [asyncio.Event(), asyncio.Event()]  # to stop, and to stop at once

    def stop() -> None:
        asked[asked[0].is_set()].set()
        starting.cancel()

    for number in ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await asyncio.wait((starting,))  # the supervisor limits it
        if asked[0].is_set():
            return
        client = starting.result()
        app = create_app(config, client, tokenizer, ring)
        text = announcement(config, listener, client.model, tokenizer is not None, ring.required)
        gc.freeze()  # a full collection of all that has been loaded would hold every stream up
        server = HttpServer(app, config, lambda: print(text, flush=True))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reading = asyncio.create_task(ring.keep_current())
        stopping = asyncio.create_task(asked[0].wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        reading.cancel()
        await drain(app.state.service, config.life.drain_s, asked[1])
        server.should_exit = True
        server.force_exit = asked[1].is_set()
        await serving  # limited by CLOSE_S
    finally:
        starting.cancel()
        await supervisor.stop()


def ending_signals() -> list[signal.Signals]:
    """Those that ask the server to stop; that of a closed terminal unless, as by nohup, it was asked to be ignored."""
    outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *(() if outlives_terminal else (signal.SIGHUP,))]


async def drain(service: Service, limit_s: float, at_once: asyncio.Event) -> None:
    """Let no generation in any more; those that run may finish within the limit, and are then ended with a reason."""
    permits = service.permits
    service.admission.draining = True
    log.info("%d generations may finish within %g s", permits.held, limit_s)
    await wait_for_any(limit_s, permits.idle, at_once)
    if permits.held:
        log.warning("%d generations are ended: %s", permits.held, SHUTTING_DOWN)
        service.engine.end_all(SHUTTING_DOWN)
        await wait_for_any(CLOSE_S, permits.idle)


async def wait_for_any(limit_s: float, *events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class HttpServer(uvicorn.Server):
    """Says when it listens, hangs up on clients that are stuck, and leaves signals to its caller."""

    def __init__(self, app: FastAPI, config: ServerConfig, on_listening: Callable[[], None]) -> None:
        limit = config.limits.max_connections or file_limit() - RESERVED_FILES
        connection = functools.partial(HttpConnection, limits=config.limits, max_connections=limit)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,  # type: ignore[arg-type]  # it is only called
                ws="none",
                lifespan="off",
                workers=1,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ssl_certfile=config.tls_cert or None,
                ssl_keyfile=config.tls_key or None,
                timeout_keep_alive=config.limits.keep_alive_s,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._on_listening = on_listening

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpConnection)
            connection.hang_up_if_stuck(now)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, send_buffer: int = 0) -> socket.socket:
    """A socket bound to the address, whose connections have a send buffer (0: the system's). Raises ConfigError."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"host {host!r} with port {port} cannot be listened on: {error.strerror or error}") from error
    return listener


def check_tls(config: ServerConfig) -> None:
    """Raises ConfigError when the files of TLS cannot be used."""
    if config.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
        except OSError as error:  # ssl.SSLError is one
            text = f"tls_cert {config.tls_cert!r} and tls_key {config.tls_key!r} cannot be used: {error}"
            raise ConfigError(text) from None


def file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_file_limit() -> None:
    """Allow as many open files, and so connections, as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def announcement(
    config: ServerConfig, listener: socket.socket, model: ModelInfo, has_tokenizer: bool, needs_key: bool
) -> str:
    """Where the server is and what it serves, and a command to try it."""
    port = listener.getsockname()[1]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    scheme = "https" if config.tls_cert else "http"
    here, there = (
        f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        for host in (config.host, reachable)
    )
    prompt: object = "Once upon a time" if has_tokenizer else list(range(min(3, model.capacity.vocab_size)))
    body = json.dumps({"prompt": prompt, "max_tokens": 32})
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return (
        f"dsc-serve: {here} serves {served_name(config)}, {model.total_parameters / 1e6:.1f} M parameters, "
        f"{model.active_parameters / 1e6:.1f} M active (kernels: {model.kernels}; {model.dtype}, {model.device}, "
        f"{model.threads} threads)\n"
        f"curl {there}/v1/completions {key}-H 'Content-Type: application/json' -d '{body}'"
    )
