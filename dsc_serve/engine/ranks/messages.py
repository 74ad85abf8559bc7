"""What the rank that leads tells those that follow, and what they answer, as frames over a local socket.

A step is told as its inputs: who follows needs no scheduler, no requests and no sampler.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from dsc_serve.config import EngineConfig
from dsc_serve.frames import framed, read_frame
from dsc_serve.model.batch import Chunk
from dsc_serve.sampling_params import EngineCapacity

MAX_FRAME = 2**30  # a step's inputs; tables of blocks are told where they change


class RankStart(msgspec.Struct, tag=True, array_like=True):
    """First message to a process: load this rank's part."""

    config: EngineConfig
    rank: int
    store: str  # the file by which ranks find each other


class RankLoaded(msgspec.Struct, tag=True, array_like=True):
    """The part is there, and there is memory for so many KV blocks of it."""

    blocks: int


class RankFailed(msgspec.Struct, tag=True, array_like=True):
    """It cannot be had."""

    error: str


class RankPool(msgspec.Struct, tag=True, array_like=True):
    """Make a KV pool for this, and meet the others once it is told that it is there."""

    capacity: EngineCapacity


class RankReady(msgspec.Struct, tag=True, array_like=True):
    """The pool is there."""


class StepInputs(msgspec.Struct, tag=True, array_like=True):
    """Compute a step; numbers are int64, as `Inputs` holds them."""

    columns: bytes  # [3 + groups, T] of tokens: ids, positions, offsets, and each group's blocks
    contexts: bytes  # [S]
    tables: list[tuple[int, bytes]]  # rows that have changed, and what they begin with: [groups, blocks]
    decodes: int
    decode_context: int
    chunks: tuple[Chunk, ...]
    drafted: int


class BlockCopies(msgspec.Struct, tag=True, array_like=True):
    """Copy KV blocks, as `Runner.copy_blocks`."""

    pairs: list[tuple[int, int]]


ToRank = RankStart | RankPool | StepInputs | BlockCopies
FromRank = RankLoaded | RankReady | RankFailed

encoder = msgspec.msgpack.Encoder()
to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def frame(message: ToRank | FromRank) -> bytes:
    return framed(encoder.encode(message), MAX_FRAME)


def receive(source: socket.socket, decoder: msgspec.msgpack.Decoder[Any], end: float | None = None) -> Any:
    """The next message. Raises EOFError where the other side has hung up, and as `read_frame` does."""
    return decoder.decode(read_frame(source, MAX_FRAME, end))
