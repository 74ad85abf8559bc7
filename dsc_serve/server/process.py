"""The server as a process: it listens, runs the engine, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from dsc_serve.config import API_KEYS, ConfigError, ServerConfig, resolve_model
from dsc_serve.server.admission import SHUTTING_DOWN
from dsc_serve.server.app import create_app, served_names
from dsc_serve.server.handshake import Handshake
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.logs import logging_to
from dsc_serve.server.protocol import HttpConnection
from dsc_serve.server.service import Service
from dsc_serve.text.broken_template import checked
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.files import file_limit, raise_file_limit
from dsc_serve.worker.messages import ModelInfo
from dsc_serve.worker.supervisor import EngineSupervisor

log = logging.getLogger(__name__)

CLOSE_S = 2  # for answers that are complete to reach their clients when the server ends
RESERVED_FILES = 64  # for all that is not a connection
LEAST_CONNECTIONS = 16
BACKLOG = 2048  # connections that the system holds until they are taken


def serve(config: ServerConfig) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then stop the engine. Prints the address and how to try it.

    Raises ConfigError, TokenizerError or EngineStartError when it cannot start.
    """
    ring = KeyRing.of(config)
    tls_context(config)
    raise_file_limit()
    most_connections(config)
    tokenizer = Tokenizer.load(resolve_model(config.engine.model))
    if tokenizer is not None and tokenizer.chat_template is not None:
        tokenizer.chat_template = checked(resolve_model(config.engine.model), tokenizer.chat_template)
    # Listened on first: an address that is taken should not cost the time of loading a model.
    with (
        bind(config.host, config.port, config.limits.send_buffer_bytes) as listener,
        logging_to(config.log),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        warn_if_open(listener, ring)
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
        app.state.service.warm()
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
        self._limits, self._most = config.limits, most_connections(config)
        self._tls = tls_context(config)
        self._handshakes: set[Handshake] = set()
        super().__init__(
            uvicorn.Config(
                app,
                http=self._connection,  # type: ignore[arg-type]  # it is only called
                ws="none",
                lifespan="off",
                workers=1,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=config.limits.keep_alive_s,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._on_listening = on_listening

    def _connection(self, **options: Any) -> asyncio.Protocol:
        connection = HttpConnection(limits=self._limits, max_connections=self._most, **options)
        if self._tls is None:
            return connection
        return Handshake(connection, self._tls, self._handshakes, self._most, self._limits.header_timeout_s)

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpConnection)
            connection.hang_up_if_stuck(now)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for handshake in list(self._handshakes):
            handshake.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, send_buffer: int = 0) -> socket.socket:
    """A socket that listens on the address, whose connections have a send buffer (0: the system's). Raises ConfigError.

    Of two sockets that are only bound, both would be: they share an address until one of them listens.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"host {host!r} with port {port} cannot be listened on: {error.strerror or error}") from error
    return listener


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The server's side of TLS; None where there is no certificate. Raises ConfigError where it cannot be used."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")
    except OSError as error:  # ssl.SSLError is one
        text = f"tls_cert {config.tls_cert!r} and tls_key {config.tls_key!r} cannot be used: {error}"
        raise ConfigError(text) from None
    return context


def most_connections(config: ServerConfig) -> int:
    """Open connections that the server takes. Raises ConfigError where open files leave no room for them."""
    files, asked = file_limit(), config.limits.max_connections
    room = files - RESERVED_FILES
    if room < LEAST_CONNECTIONS:
        least = RESERVED_FILES + LEAST_CONNECTIONS
        raise ConfigError(f"at most {files} files may be open (ulimit -n); it must be at least {least}")
    if asked > room:
        raise ConfigError(
            f"max_connections is {asked}, but at most {files} files may be open (ulimit -n); it must be at most {room}"
        )
    return asked or room


def warn_if_open(listener: socket.socket, ring: KeyRing) -> None:
    """Say so in the log where anybody who reaches this machine may use the server."""
    address = listener.getsockname()[0]
    if not ring.required and not is_loopback(address):
        log.warning(
            "no API keys are set and %s is not a loopback address: whoever reaches it may use this server; set "
            "key_file or %s",
            address,
            API_KEYS,
        )


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


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
        f"dsc-serve: {here} serves {', '.join(served_names(config))}, {model.total_parameters / 1e6:.1f} M parameters, "
        f"{model.active_parameters / 1e6:.1f} M active (kernels: {model.kernels}; {model.dtype}, {model.device}, "
        f"{model.threads} threads)\n"
        + (f"dsc-serve: {model.captured}\n" if model.captured else "")
        + f"curl {there}/v1/completions {key}-H 'Content-Type: application/json' -d '{body}'"
    )
