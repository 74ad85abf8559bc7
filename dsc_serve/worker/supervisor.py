"""Starts the engine process, watches it, starts it again when it has died or hangs, and stops it. Free of torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from dsc_serve.config import EngineConfig, LifeConfig, engine_environment
from dsc_serve.machine import default_threads
from dsc_serve.worker.client import EngineClient
from dsc_serve.worker.connection import EngineConnection, EngineDiedError, receive
from dsc_serve.worker.files import SpareFiles
from dsc_serve.worker.messages import ModelInfo, Start, StartFailed, Stats, frame

log = logging.getLogger(__name__)

# -P: the modules that this process has, not what lies in the working directory under their names.
ENGINE = (sys.executable, "-P", "-m", "dsc_serve.worker.process")
STOP_TIMEOUT_S = 10.0
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 30.0


class EngineStartError(RuntimeError):
    """The engine did not come up; one line that says why."""


class ModelChangedError(EngineStartError):
    """The engine has loaded another model than the one that is served: its tokenizer and name would be wrong."""


class EngineSupervisor:
    """One engine process at a time, and the client that is always connected to the present one.

    command: what to run as the engine, before the number of its socket.
    """

    def __init__(
        self, config: EngineConfig, life: LifeConfig, max_unread: int, command: Sequence[str] = ENGINE
    ) -> None:
        self.config = msgspec.structs.replace(config, threads=config.threads or default_threads())
        self.life = life
        self.client = EngineClient(max_unread)
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._connection: EngineConnection | None = None
        self._watch: asyncio.Task[None] | None = None
        self._restarts: deque[float] = deque()
        self._spare_files = SpareFiles()
        self._fingerprint: str | None = None  # of the model that the first engine loaded

    async def start(self) -> EngineClient:
        """Start the engine, wait until its model is loaded, and watch it from then on. Raises EngineStartError."""
        connection = await self._start()
        self._watch = asyncio.create_task(self._keep_running(connection))
        return self.client

    async def stop(self) -> None:
        """Stop the engine: ask it, and kill it if it has not ended in time. Safe to call twice."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._connection is not None:
            self._connection.shut_down("the server is shutting down")
        self.client.give_up("the server is shutting down")
        self._spare_files.let_go()
        await self._end_process()

    async def _start(self) -> EngineConnection:
        self._spare_files.let_go()  # all that an engine takes is opened before anybody else has a turn
        try:
            reader, writer = await self._spawn()
        finally:
            self._spare_files.hold()
        writer.write(frame(Start(self.config)))
        try:
            async with asyncio.timeout(self.life.start_timeout_s):
                model = await hello(reader)
            self._check_same(model)
        except BaseException as error:
            writer.close()
            await self._kill()
            if isinstance(error, TimeoutError):
                raise EngineStartError(f"the engine did not start within {self.life.start_timeout_s:g} s") from None
            raise
        self._connection = EngineConnection(reader, writer, model, self.client.take)
        self.client.attach(self._connection)
        return self._connection

    async def _spawn(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new engine process, and the way to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(*self._command, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=engine_environment(self.config.threads),
                preexec_fn=os.setpgrp,  # own group, no own session: see `grammars.link`
            )
        return await asyncio.open_connection(sock=ours)

    def _check_same(self, model: ModelInfo) -> None:
        """Raises ModelChangedError."""
        if self._fingerprint not in (None, model.fingerprint):
            # Clients hear it: no path.
            what = "the model in its folder is not the one that this server was started with"
            raise ModelChangedError(f"{what}; start the server again to serve it")
        self._fingerprint = model.fingerprint

    async def _keep_running(self, connection: EngineConnection | None) -> None:
        while connection is not None:
            reason = await self._broken(connection)
            log.error("%s; starting it again", reason)
            connection.lose(reason)
            self.client.detach(reason)
            await self._kill()
            connection = await self._start_again(reason)

    async def _start_again(self, reason: str) -> EngineConnection | None:
        """A connection to a new engine, or None where that has been tried too often."""
        while True:
            now = time.monotonic()
            while self._restarts and now - self._restarts[0] > self.life.restart_window_s:
                self._restarts.popleft()
            if len(self._restarts) >= self.life.max_restarts:
                message = (
                    f"{reason}; it was started again {len(self._restarts)} times within "
                    f"{self.life.restart_window_s:g} s, so the server gives up"
                )
                log.critical(message)
                self.client.give_up(message)
                return None
            await asyncio.sleep(min(FIRST_BACKOFF_S * 4.0 ** min(len(self._restarts), 9), LAST_BACKOFF_S))
            self._restarts.append(now)
            self.client.restarts += 1
            try:
                connection = await self._start()
            except ModelChangedError as error:  # which no further try mends
                log.critical("the engine could not be started again: %s", error)
                self.client.give_up(str(error))
                return None
            except (EngineStartError, EngineDiedError, OSError) as error:
                # Clients are told of the reason, and what failed to start may name files of this machine.
                reason = "the engine could not be started again (the log says why)"
                log.error("the engine could not be started again: %s", error)
            else:
                log.warning("the engine runs again")
                return connection

    async def _broken(self, connection: EngineConnection) -> str:
        """Return why the engine must be replaced, once it must; until then tell the client how the engine is.

        Times are counted in looks that found no life, not by a clock: a machine that was asleep proves nothing.
        """
        life, silent = self.life, 0.0
        last: Stats | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(life.ping_s):
                    return await asyncio.shield(connection.lost)
            self._spare_files.hold()
            try:
                stats = await connection.stats(life.ping_s)
            except TimeoutError:
                silent += 2 * life.ping_s
                trouble = f"the engine has not answered for {silent:g} s"
            except EngineDiedError as error:
                return str(error)
            else:
                silent = silent + life.ping_s if last is not None and is_stuck(last, stats) else 0.0
                trouble = f"the engine has work, and has completed no step for {silent:g} s"
                last = stats
            self.client.trouble = trouble if silent >= life.stall_s else ""
            if silent >= life.hang_s:
                return f"the engine hangs: {trouble}; where its steps take so long, raise hang_s or lower step_tokens"

    async def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # With all that it has started: other ranks may be stopped, and not notice that it has ended.
                os.killpg(self._process.pid, signal.SIGKILL)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                log.error("the engine process %d cannot be killed", self._process.pid)

    async def _end_process(self) -> None:
        """Wait for the engine, which has been asked to end, and kill it if it does not in time."""
        if self._process is not None:
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                await self._kill()


async def hello(reader: asyncio.StreamReader) -> ModelInfo:
    """What a new engine says when it is ready. Raises EngineStartError."""
    try:
        message = await receive(reader)
    except EngineDiedError:
        raise EngineStartError("the engine process ended while starting; its message is above") from None
    if isinstance(message, StartFailed):
        raise EngineStartError(message.error)
    if not isinstance(message, ModelInfo):
        raise EngineStartError(f"the engine said {type(message).__name__} before it was ready")
    return message


def is_stuck(before: Stats, now: Stats) -> bool:
    """Whether the engine had work at both times and completed no step between them."""
    return before.running + before.waiting > 0 and now.running + now.waiting > 0 and before.steps == now.steps
