"""One grammar's process, as the engine knows it."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsc_serve.grammars.faults import GrammarsLostError
from dsc_serve.grammars.memory import grown_bytes
from dsc_serve.grammars.messages import Answer, Drop, Foreseen, Kill, Look, Open, Push, ToGrammar, encode
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from dsc_serve.grammars.constraint import Constraint
    from dsc_serve.grammars.link import Link

MOST_TOKENS = 8192  # in a packet
Told = Callable[[ParameterError | GrammarsLostError | None], None]


@dataclass(eq=False)
class Grammar:
    """One grammar's process, from when it is asked for until its end has been told. Used under the grammars' lock."""

    id: int
    key: bytes  # digest of what was asked for
    asked: StructuredOutputs
    connection: socket.socket
    link: Link
    compiled: bool = False
    pid: int = 0  # 0: not known yet
    bytes_at_first: int = 0  # what it shared with its host then, and holds still
    memory_bytes: int = 0
    looked_s: float = 0.0  # of the processor, for what nobody had to wait for
    used: int = 0  # when it was last asked for, in uses of all grammars
    waiters: list[Told] = field(default_factory=list)  # told what is wrong, or None once it can be used
    outputs: dict[int, Constraint] = field(default_factory=dict)
    pending: deque[int] = field(default_factory=deque)  # outputs that answers are due for, in order
    unsent: deque[bytes] = field(default_factory=deque)
    demoted: bool = False
    ending: str = ""  # why it was told to end
    blameless: bool = False  # whether that was nobody's fault who asked for it
    hurried: bool = False  # whether its memory has been asked back at once

    @property
    def idle(self) -> bool:
        return not self.outputs and not self.waiters

    @property
    def computing(self) -> bool:
        return not self.compiled or bool(self.pending)

    def measure(self) -> None:
        """Take in what it holds now: it says so itself only when it has answered."""
        if self.pid and self.computing:
            self.memory_bytes = max(self.memory_bytes, grown_bytes(self.pid, self.bytes_at_first))

    def kill(self, why: str, at_once: bool = False) -> None:
        """The host will say that it has ended. at_once: somebody needs its memory."""
        self.ending = self.ending or why
        self.hurried = self.hurried or at_once
        self.link.send(Kill(self.id, at_once))

    def send(self, message: ToGrammar) -> None:
        """Never waits: what finds no room is sent when there is some."""
        self.unsent.append(encode(message))
        self.flush()

    def flush(self) -> None:
        try:
            while self.unsent:
                self.connection.send(self.unsent[0])
                self.unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which the host tells
            self.unsent.clear()
        self.link.await_room(self, bool(self.unsent))

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

    def look(self, output: int, number: int, tokens: Sequence[int], known: int) -> None:
        self.pending.append(output)
        self.send(Look(output, number, list(tokens), known))

    def answered(self, message: Answer | Foreseen) -> None:
        """It has said what it was asked, or a part of that."""
        if isinstance(message, Foreseen):
            self.looked_s += message.cpu_s
        if message.last and self.pending and self.pending[0] == message.output:
            self.pending.popleft()

    def drop(self, output: int) -> None:
        self.send(Drop(output))
