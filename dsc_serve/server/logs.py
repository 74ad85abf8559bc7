"""Logging that can neither stop the server nor hold it up: a full disk or a pipe that nobody reads costs lines only."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import msgspec

from dsc_serve.config import ConfigError, LogConfig
from dsc_serve.server.middleware import request_id

WAITING_LINES = 10_000
FLUSH_S = 1.0
LOGGERS = ("dsc_serve", "uvicorn.error")
# What clients wrote must neither begin a line of its own nor steer a terminal.
ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


class TextFormatter(logging.Formatter):
    """Time, level, message, then facts as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={quoted(str(value))}" for name, value in facts_of(record).items())
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{time} {record.levelname.lower()} {record.getMessage()} {facts}".rstrip().translate(ESCAPED)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts_of(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def quoted(value: str) -> str:
    """A fact's value, in quotes where it could be taken for more than one."""
    return msgspec.json.encode(value).decode() if set(value) & set(' ="') else value


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """What a line says besides its message: the request that it belongs to, and the caller's own facts."""
    facts: dict[str, object] = getattr(record, "facts", {})
    name = getattr(record, "request_id", "")
    return {"request_id": name, **facts} if name else facts


class Writer(logging.Handler):
    """Formats where the line is logged, and writes in a thread of its own, which tells how many lines were lost."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._lost = 0
        self._descriptor = descriptor
        self._stopping = False
        self._lines: queue.Queue[bytes | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        record.request_id = request_id.get()
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):  # the server's end, and no fault
            record.msg, record.args, record.exc_info = "an answer was cut off by the server's end", (), None
        try:
            self._lines.put_nowait(self.format(record).encode("utf-8", "replace") + b"\n")
        except queue.Full:
            self._lost += 1

    def stop(self) -> None:
        """Write what waits, as far as that goes within FLUSH_S."""
        try:
            self._lines.put(None, timeout=FLUSH_S)
        except queue.Full:
            self._stopping = True
        self._thread.join(FLUSH_S)

    def _write(self) -> None:
        told = 0
        while not self._stopping and (line := self._lines.get()) is not None:  # ended by `stop`
            lost = self._lost - told
            try:
                os.write(self._descriptor, self._note(lost) + line if lost else line)
                told += lost
            except OSError:
                self._lost += 1

    def _note(self, lost: int) -> bytes:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, "%d log lines were lost", (lost,), None)
        return self.format(record).encode() + b"\n"


@contextmanager
def logging_to(config: LogConfig) -> Iterator[None]:
    """Log as configured while the block runs. Raises ConfigError when the file cannot be opened."""
    descriptor = sys.stderr.fileno()
    if config.log_file:
        try:
            descriptor = os.open(config.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigError(f"log_file is {config.log_file!r}; it cannot be written: {error.strerror}") from None
    writer = Writer(descriptor)
    writer.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(writer)
        logger.propagate = False
    loggers[0].setLevel(config.log_level.upper())
    loggers[1].setLevel(logging.ERROR)  # it warns of every connection that is not HTTP
    try:
        yield
    finally:
        writer.stop()
        for logger in loggers:
            logger.removeHandler(writer)
            logger.propagate = True
        if config.log_file:
            os.close(descriptor)
