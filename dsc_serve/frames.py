"""Messages between the processes of a server, as frames: a 4-byte little-endian length, then one msgpack document.

Nothing is pickled.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import msgspec

HEADER = struct.Struct("<I")
PIECE = 2**20  # most bytes to take from a socket at a time


class FrameError(ValueError):
    """A frame that is larger than it may be."""


def framed(body: bytes, most: int = 2**32 - 1) -> bytes:
    """Raises FrameError for a body of more than `most` bytes."""
    if len(body) > most:
        raise FrameError(f"a message of {len(body)} bytes exceeds the limit of {most}")
    return HEADER.pack(len(body)) + body


def size_of(header: bytes, most: int) -> int:
    """Bytes of the body behind a header. Raises FrameError for more than `most`."""
    size: int = HEADER.unpack(header)[0]
    if size > most:
        raise FrameError(f"a frame of {size} bytes was announced; at most {most} are allowed")
    return size


def read_frame(source: socket.socket, most: int, end: float | None = None) -> bytes:
    """The body of the next frame. Raises FrameError, and what `read_exactly` does."""
    return read_exactly(source, size_of(read_exactly(source, HEADER.size, end), most), end)


def read_exactly(source: socket.socket, size: int, end: float | None = None) -> bytes:
    """So many bytes. Raises EOFError where fewer come, OSError, TimeoutError when monotonic time has come to `end`."""
    parts = bytearray()
    while len(parts) < size:
        if end is not None:
            source.settimeout(max(0.001, end - time.monotonic()))
        piece = source.recv(min(size - len(parts), PIECE))
        if not piece:
            raise EOFError
        parts += piece
    return bytes(parts)


def limit_sending(connection: socket.socket, seconds: float) -> None:
    """Let sending raise BlockingIOError where the other side reads nothing for so long."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))  # a C struct timeval
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class Frames:
    """Cuts a stream into messages as it arrives."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._decoder, self._bytes = decoder, bytearray()

    def add(self, piece: bytes) -> Iterator[Any]:
        """The messages that end with this piece."""
        self._bytes += piece
        while not self.missing:
            end = self._end
            body = bytes(self._bytes[HEADER.size : end])
            del self._bytes[:end]
            yield self._decoder.decode(body)

    @property
    def missing(self) -> int:
        """Bytes to come until a message ends, or its header where that has not come."""
        return max(self._end - len(self._bytes), 0)

    @property
    def _end(self) -> int:
        if len(self._bytes) < HEADER.size:
            return HEADER.size
        size: int = HEADER.unpack_from(self._bytes)[0]
        return HEADER.size + size
