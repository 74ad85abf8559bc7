"""Starts the engine process, connects to it, and stops it. Free of torch."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys

import msgspec

from dsc_serve.config import EngineConfig, default_threads, engine_environment
from dsc_serve.worker.client import EngineClient
from dsc_serve.worker.messages import HEADER, MAX_FRAME, ModelInfo, Start, StartFailed, frame, from_engine_decoder

STOP_TIMEOUT_S = 10.0


class EngineStartError(RuntimeError):
    """The engine did not come up; one line that says why."""


class EngineSupervisor:
    """One engine process and the client connected to it."""

    def __init__(self, config: EngineConfig, start_timeout_s: float) -> None:
        self.config = msgspec.structs.replace(config, threads=config.threads or default_threads())
        self.start_timeout_s = start_timeout_s
        self.client: EngineClient | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> EngineClient:
        """Start the process and wait until its model is loaded. Raises EngineStartError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dsc_serve.worker.process", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=engine_environment(self.config.threads),
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(frame(Start(self.config)))
        try:
            model = await asyncio.wait_for(self._hello(reader), self.start_timeout_s)
        except TimeoutError:
            await self.stop()
            raise EngineStartError(f"the engine did not start within {self.start_timeout_s:g} s") from None
        except (EngineStartError, ConnectionError):
            writer.close()
            await self.stop()
            raise
        self.client = EngineClient(reader, writer, model)
        return self.client

    async def stop(self) -> None:
        """Stop the process: ask it, and kill it if it has not ended in time. Safe to call twice."""
        if self.client is not None:
            await self.client.close()
        process = self._process
        if process is None or process.returncode is not None:
            return
        if self.client is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()  # a killed process ends

    async def _hello(self, reader: asyncio.StreamReader) -> ModelInfo:
        try:
            (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            message = from_engine_decoder.decode(await reader.readexactly(min(size, MAX_FRAME)))
        except asyncio.IncompleteReadError:
            raise EngineStartError("the engine process ended while starting; its message is above") from None
        if isinstance(message, StartFailed):
            raise EngineStartError(message.error)
        if not isinstance(message, ModelInfo):
            raise EngineStartError(f"the engine said {type(message).__name__} before it was ready")
        return message
