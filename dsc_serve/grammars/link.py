"""The engine's end of the grammars: one thread that sends and receives.

Nothing here waits for a grammar. What arrives is told to a `Listener`, under its lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from dsc_serve.config import grammar_environment
from dsc_serve.frames import Frames
from dsc_serve.grammars.faults import GrammarsLostError
from dsc_serve.grammars.grammar import Grammar
from dsc_serve.grammars.messages import (
    Begin,
    Compile,
    Ended,
    Forked,
    FromGrammar,
    ToHost,
    frame,
    from_grammar,
    from_host,
)

log = logging.getLogger(__name__)

# -P: the modules that this process has, not what lies in the working directory under their names.
HOST = (sys.executable, "-P", "-m", "dsc_serve.grammars.host")
PACKET = 2**18
PIECE = 2**16
CLOSE_LIMIT_S = 5.0


class Listener(Protocol):
    """Hears what the link has to say. All is called by its thread."""

    lock: threading.Condition

    def heard(self, grammar: Grammar, message: FromGrammar) -> None:
        """Under the lock."""

    def forked(self, message: Forked) -> None:
        """A grammar has a process. Under the lock."""

    def ended(self, message: Ended) -> None:
        """A grammar is no more. Under the lock."""

    def broken(self, grammar: Grammar) -> None:
        """A grammar has sent what cannot be read. Under the lock."""

    def lost(self, link: Link) -> None:
        """The host is gone, and all grammars of this link. Once; under the lock."""

    def look(self) -> float | None:
        """Called again and again; seconds until it has to be. None: when something has been sent or has come."""


class Link:
    """One host and the thread that starts it and speaks with it, until `close`.

    begin: makes the host's first message; called by the thread.
    """

    def __init__(self, begin: Callable[[], Begin], listener: Listener) -> None:
        self._begin, self._listener, self._lock = begin, listener, listener.lock
        self._connection, self._theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._frames = Frames(from_host)
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._theirs.close()
            self._release()
            raise

    def compile(self, grammar: Grammar, theirs: socket.socket) -> None:
        """Have a grammar compiled by a new process, which gets this end of its socket. Under the listener's lock."""
        if self.closed:
            raise GrammarsLostError("the process that compiles grammars has ended")
        self._selector.register(grammar.connection, selectors.EVENT_READ, grammar)
        self._put(Compile(grammar.id, grammar.asked), theirs.detach())

    def send(self, message: ToHost) -> None:
        self._put(message, None)

    def poke(self) -> None:
        """Have the thread ask its listener again when to look."""
        with contextlib.suppress(OSError):  # full: it will look anyway; closed: it needs not
            self._wake[1].send(b"w")

    def await_room(self, grammar: Grammar, wanted: bool) -> None:
        """Flush a grammar's messages as soon as its socket takes more, or no longer. Under the listener's lock."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        with contextlib.suppress(KeyError, ValueError, RuntimeError):  # it has been hung up on
            if self._selector.get_key(grammar.connection).events != events:
                self._selector.modify(grammar.connection, events, grammar)

    def drain(self, grammar: Grammar) -> None:
        """Hear all that a grammar has sent so far. Under the listener's lock."""
        try:
            while packet := received(grammar.connection):
                self._listener.heard(grammar, from_grammar.decode(packet))
        except BlockingIOError:
            return
        except msgspec.MsgspecError:
            self._listener.broken(grammar)
        except OSError:
            pass
        self.forget(grammar)  # it has hung up, and the host tells why; or nothing it says is worth hearing

    def forget(self, grammar: Grammar) -> None:
        """Hang up on a grammar; one that is not computing then ends by itself. Safe to call twice."""
        with contextlib.suppress(KeyError, ValueError, RuntimeError):
            self._selector.unregister(grammar.connection)
        grammar.connection.close()

    def close(self) -> None:
        """Hang up; the host and all grammars end. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self.poke()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_LIMIT_S)

    def _put(self, message: ToHost, descriptor: int | None) -> None:
        self._outbox.append((frame(message), descriptor))
        self.poke()

    def _run(self) -> None:
        try:
            with self._theirs:
                self._start(self._theirs.fileno())
            while not self.closed:
                self._empty_outbox()
                for key, events in self._selector.select(self._listener.look()):
                    if key.fileobj is self._wake[0]:
                        with contextlib.suppress(BlockingIOError):
                            self._wake[0].recv(PIECE)
                    elif key.data is None:
                        self._hear_host()
                    else:
                        self._hear(key.data, events)
        except (OSError, msgspec.MsgspecError) as error:  # the host is gone, or cannot be had
            if not self.closed:
                log.error("the host of grammars has ended (%s); it is started again when it is needed", error)
        finally:
            self._end()

    def _start(self, theirs: int) -> None:
        begin = frame(self._begin())
        # A group of its own, so that a terminal's signals pass it by, but no session of its own: where Linux shares
        # processors between sessions (autogroup), niceness counts within one alone, and grammars got a third of a
        # processor beside an engine in another, however far down they were put.
        self._process = subprocess.Popen(
            (*HOST, str(theirs)),
            pass_fds=(theirs,),
            stdin=subprocess.DEVNULL,
            env=grammar_environment(),
            process_group=0,
        )
        self._connection.sendall(begin)

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
            raise ConnectionResetError("it has hung up")
        for message in self._frames.add(piece):
            with self._lock:
                if isinstance(message, Forked):
                    self._listener.forked(message)
                else:
                    self._listener.ended(message)
                self._lock.notify_all()

    def _hear(self, grammar: Grammar, events: int) -> None:
        with self._lock:
            if events & selectors.EVENT_READ:
                self.drain(grammar)
            grammar.flush()
            self._lock.notify_all()

    def _end(self) -> None:
        with self._lock:
            unexpected, self.closed = not self.closed, True
            for key in list(self._selector.get_map().values()):
                if key.data is not None:
                    self.forget(key.data)
            self._release()
            if unexpected:
                self._listener.lost(self)
            self._lock.notify_all()
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_LIMIT_S)
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def _release(self) -> None:
        while self._outbox:
            descriptor = self._outbox.popleft()[1]
            if descriptor is not None:
                os.close(descriptor)
        self._selector.close()
        self._connection.close()
        for end in self._wake:
            end.close()


def received(connection: socket.socket) -> bytes:
    """The next packet; empty at the end. Raises msgspec.DecodeError for one that is too long, and OSError."""
    try:
        packet, _, flags, _ = connection.recvmsg(PACKET)
    except ConnectionResetError:  # told once where it has ended and left something unread; what it had sent comes next
        packet, _, flags, _ = connection.recvmsg(PACKET)
    if flags & socket.MSG_TRUNC:
        raise msgspec.DecodeError(f"a packet of more than {PACKET} bytes")
    return packet


def grammar_sockets() -> tuple[socket.socket, socket.socket]:
    """Ours, which never waits, and the grammar's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs
