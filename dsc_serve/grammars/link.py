"""The engine's end of the grammars: one thread that sends and receives, and what is known of each grammar.

Nothing here waits for a grammar. What arrives is kept in `Grammar` and `Constraint`, under one lock, and told by one
condition.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsc_serve.config import grammar_environment
from dsc_serve.grammars.messages import (
    Begin,
    Compile,
    Drop,
    Ended,
    Frames,
    FromGrammar,
    Open,
    Push,
    ToGrammar,
    ToHost,
    encode,
    framed,
    from_grammar,
    from_host,
)
from dsc_serve.sampling_params import StructuredOutputs

if TYPE_CHECKING:
    from dsc_serve.grammars.constraint import Constraint

# -P: the modules that this process has, not what lies in the working directory under their names.
HOST = (sys.executable, "-P", "-m", "dsc_serve.grammars.host")
PACKET = 2**18
PIECE = 2**16
MOST_TOKENS = 8192  # in a packet
CLOSE_LIMIT_S = 5.0


@dataclass(eq=False)
class Grammar:
    """One grammar's process, as the engine knows it."""

    id: int
    key: bytes  # digest of what was asked for
    asked: StructuredOutputs
    connection: socket.socket
    compiled: bool = False
    memory_bytes: int = 0
    used: int = 0  # when it was last asked for, in uses of all grammars
    waiters: list[Callable[[str], None]] = field(default_factory=list)  # told of an error, or "" once it can be used
    outputs: dict[int, Constraint] = field(default_factory=dict)
    pending: deque[int] = field(default_factory=deque)  # outputs that answers are due for, in order
    unsent: deque[bytes] = field(default_factory=deque)
    demoted: bool = False
    ending: str = ""  # why it was told to end

    @property
    def idle(self) -> bool:
        return not self.outputs and not self.waiters

    def send(self, message: ToGrammar) -> None:
        """Never waits: what finds no room is sent when the next answer has come."""
        self.unsent.append(encode(message))
        self.flush()

    def flush(self) -> None:
        try:
            while self.unsent:
                self.connection.send(self.unsent[0])
                self.unsent.popleft()
        except BlockingIOError:
            return
        except OSError:  # it has ended, which the host tells
            self.unsent.clear()

    def open(self, output: int, tokens: Sequence[int]) -> None:
        first, rest = list(tokens[:MOST_TOKENS]), list(tokens[MOST_TOKENS:])
        self.pending.append(output)
        self.send(Open(output, first))
        while rest:
            self.pending.append(output)
            self.send(Push(output, rest[:MOST_TOKENS]))
            rest = rest[MOST_TOKENS:]

    def push(self, output: int, token: int) -> None:
        self.pending.append(output)
        self.send(Push(output, [token]))

    def drop(self, output: int) -> None:
        self.send(Drop(output))


class Link:
    """One host and the thread that speaks with it, until `close`.

    heard: called for what a grammar says; ended: for one that is no more; lost: once, when the host is. All by the
    thread, under `lock`.
    """

    def __init__(
        self,
        begin: Begin,
        lock: threading.Condition,
        heard: Callable[[Grammar, FromGrammar], None],
        ended: Callable[[Ended], None],
        lost: Callable[[], None],
    ) -> None:
        self._lock, self._heard, self._ended, self._lost = lock, heard, ended, lost
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                (*HOST, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=grammar_environment(),
                start_new_session=True,
            )
        self._frames = Frames(from_host)
        self._outbox: deque[tuple[bytes, int | None]] = deque([(framed(begin), None)])
        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
        self._thread.start()

    def compile(self, grammar: Grammar, theirs: socket.socket) -> None:
        """Have a grammar compiled by a new process, which gets this end of its socket."""
        self._selector.register(grammar.connection, selectors.EVENT_READ, grammar)
        self._put(Compile(grammar.id, grammar.asked), theirs.detach())

    def send(self, message: ToHost) -> None:
        self._put(message, None)

    def forget(self, grammar: Grammar) -> None:
        """Hang up on a grammar; one that is not computing then ends by itself. Safe to call twice."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(grammar.connection)
        grammar.connection.close()

    def close(self) -> None:
        """Hang up; the host and all grammars end. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._poke()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_LIMIT_S)

    def _put(self, message: ToHost, descriptor: int | None) -> None:
        self._outbox.append((framed(message), descriptor))
        self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):  # full: it will look anyway; closed: it needs not
            self._wake[1].send(b"w")

    def _run(self) -> None:
        try:
            while not self.closed:
                self._empty_outbox()
                for key, _ in self._selector.select():
                    if key.fileobj is self._wake[0]:
                        with contextlib.suppress(BlockingIOError):
                            self._wake[0].recv(PIECE)
                    elif key.data is None:
                        self._hear_host()
                    else:
                        self._hear(key.data)
        except OSError:
            pass  # the host is gone
        finally:
            self._end()

    def _empty_outbox(self) -> None:
        """May wait for the host, which only looks and forks; nobody waits for this thread."""
        while self._outbox:
            body, descriptor = self._outbox.popleft()
            if descriptor is None:
                self._connection.sendall(body)
                continue
            try:
                sent = socket.send_fds(self._connection, [body], [descriptor])
            finally:
                os.close(descriptor)
            self._connection.sendall(body[sent:])

    def _hear_host(self) -> None:
        piece = self._connection.recv(PIECE)
        if not piece:
            raise ConnectionResetError("the host has hung up")
        for message in self._frames.add(piece):
            with self._lock:
                self._ended(message)
                self._lock.notify_all()

    def _hear(self, grammar: Grammar) -> None:
        with self._lock:
            try:
                while packet := grammar.connection.recv(PACKET):
                    self._heard(grammar, from_grammar.decode(packet))
            except BlockingIOError:
                pass
            except OSError:
                self.forget(grammar)
            else:
                self.forget(grammar)  # it has hung up: the host tells why
            self._lock.notify_all()

    def _end(self) -> None:
        unexpected = not self.closed
        self.closed = True
        with self._lock:
            for key in list(self._selector.get_map().values()):
                if key.data is not None:
                    self.forget(key.data)
            while self._outbox:
                descriptor = self._outbox.popleft()[1]
                if descriptor is not None:
                    os.close(descriptor)
            self._selector.close()
            self._connection.close()
            for end in self._wake:
                end.close()
            if unexpected:
                self._lost()
            self._lock.notify_all()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_LIMIT_S)
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()


def grammar_sockets() -> tuple[socket.socket, socket.socket]:
    """Ours, which never waits, and the grammar's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs
