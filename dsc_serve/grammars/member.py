"""One grammar's process: compiles it, then says after every token of an output what may follow."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import llguidance
import numpy as np

from dsc_serve.grammars.compile import compiled, reason
from dsc_serve.grammars.memory import own_bytes, private_bytes, virtual_bytes
from dsc_serve.grammars.messages import (
    NO_OUTPUT,
    Answer,
    Compiled,
    Drop,
    Foreseen,
    FromGrammar,
    Look,
    Open,
    encode,
    to_grammar,
)
from dsc_serve.grammars.schema import FIELD, unusable
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs

LARGEST_PACKET = 2**18
LOOK_BYTES = 2**16  # of what is foreseen, after which it is sent
LOOK_S = 0.02  # what a look may take; its next answer is the last one then
MEASURED_EVERY = 64  # answers; between two of them what it has grown by is told apart from what it shares no longer
OUT_OF_MEMORY = 77  # exit code
STACK_BYTES = 64 * 2**20  # the library recurses into what nests; only what is touched is taken


class FollowedOutput:
    """How far one request's output has come."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher, self.count = matcher, 0

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.matcher.consume_token(token)
        self.count += len(tokens)


class Member:
    """Serves the outputs of one grammar until its socket is closed.

    vocab_size: of the model; the library's vocabulary has one token more. ends: the model's ends of a text.
    most_forced: tokens that an answer tells beforehand. computes: told which output's answer is computed from now on,
    or NO_OUTPUT.
    """

    def __init__(
        self,
        connection: socket.socket,
        vocab_size: int,
        ends: Sequence[int],
        memory_bytes: int,
        most_forced: int,
        computes: Callable[[int], None],
    ) -> None:
        self._connection, self._vocab_size, self._ends = connection, vocab_size, list(ends)
        self._computes, self._most_forced = computes, most_forced
        self._outputs: dict[int, FollowedOutput] = {}
        self._at_first = private_bytes()
        self._unshared, self._answers = 0, 0
        size = virtual_bytes() + memory_bytes + STACK_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def run(self, asked: StructuredOutputs, tokens: llguidance.LLTokenizer, tell: Callable[[int], None]) -> int:
        """Returns the exit code. tell: called with the thread that compiles, and with 0 once it has."""
        faults: list[BaseException] = []

        def compile_() -> None:
            # In a thread of its own, which others may put behind theirs: the answers that follow keep their rank.
            tell(threading.get_native_id())
            try:
                self._matcher = compiled(asked, tokens)
                self._matcher.compute_bitmask()  # what this takes every output would take at its beginning
            except BaseException as error:  # a panic of the library is not an Exception
                faults.append(error)

        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=compile_)
        thread.start()
        thread.join()
        if faults:
            if isinstance(faults[0], MemoryError):
                return OUT_OF_MEMORY
            what = str(faults[0])
            self._send(
                Compiled(what if isinstance(faults[0], ParameterError) else str(unusable(reason(what)[:300])), 0)
            )
            return 0
        tell(0)
        self._send(Compiled("", self._memory(closely=True)))
        try:
            while packet := self._connection.recv(LARGEST_PACKET):
                self._take(packet)
        except MemoryError:
            return OUT_OF_MEMORY
        except (BrokenPipeError, ConnectionResetError):
            pass
        return 0

    def _take(self, packet: bytes) -> None:
        message = to_grammar.decode(packet)
        if isinstance(message, Drop):
            self._outputs.pop(message.output, None)
            return
        if isinstance(message, Look):  # which no output answers for: nothing of it need be known
            self._look(message)
            return
        self._computes(message.output)
        if isinstance(message, Open):
            self._outputs[message.output] = FollowedOutput(self._matcher.deep_copy())
        output = self._outputs.get(message.output)
        answer = None if output is None else self._answer(message.output, output, message.tokens)
        self._computes(NO_OUTPUT)
        if answer is not None:
            self._send(answer)

    def _answer(self, name: int, output: FollowedOutput, tokens: Sequence[int]) -> Answer:
        allowed, complete, error = b"", False, ""
        forced: tuple[int, ...] = ()
        after = b""
        try:
            output.push(tokens)
            matcher = output.matcher
            complete = bool(matcher.is_stopped()) and not matcher.is_error()
            if not complete:
                allowed = self._allowed(matcher)
                if matcher.is_error():
                    error = f"{FIELD} cannot be followed further: {reason(matcher.get_error())}"
                elif not any(allowed):
                    error = f"{FIELD} cannot be followed further: no token of the model fits"
                elif self._most_forced:
                    forced, after = self._forced(matcher)
        except MemoryError:
            raise
        except BaseException as fault:  # a panic of the library is not an Exception
            error = f"{FIELD} cannot be followed further: {reason(str(fault))[:300]}"
        self._answers += 1
        memory = self._memory(closely=self._answers % MEASURED_EVERY == 0)
        return Answer(name, output.count, allowed, complete, error, memory, forced, after)

    def _look(self, message: Look) -> None:
        """Say what may follow tokens, as far as there is time for it. A library that fails at this has not failed."""
        began = time.process_time()
        found: list[bytes] = []

        def tell(last: bool) -> None:
            nonlocal began, found
            now = time.process_time()
            memory = self._memory(closely=False)
            self._send(Foreseen(message.output, message.number, found, last, memory, now - began))
            began, found = now, []

        try:
            for allowed in self._foreseen(message):
                found.append(allowed)
                if sum(map(len, found)) >= LOOK_BYTES:
                    tell(last=False)
        except (MemoryError, OSError):
            raise
        except BaseException:  # a panic of the library is not an Exception
            pass
        tell(last=True)

    def _foreseen(self, message: Look) -> Iterator[bytes]:
        """What may follow each token of a look; ends where something else is asked, and where nothing may follow."""
        output = self._outputs.get(message.output)
        if output is None:
            return
        ahead, until = output.matcher.deep_copy(), time.monotonic() + LOOK_S
        for i, token in enumerate(message.tokens):
            if token >= self._vocab_size or self._asked() or time.monotonic() > until:
                return
            ahead.consume_token(token)
            if ahead.is_error() or ahead.is_stopped():
                return
            if i >= message.known:
                allowed = self._allowed(ahead)
                if ahead.is_error() or not any(allowed):
                    return
                yield allowed

    def _asked(self) -> bool:
        """Whether another message has come, or nobody is there any more."""
        try:
            self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def _forced(self, matcher: llguidance.LLMatcher) -> tuple[tuple[int, ...], bytes]:
        """The tokens that must follow one after the other, and what may follow the last.

        A library that fails at this, which need not be known, has not failed at the answer.
        """
        try:
            return self._look_ahead(matcher)
        except MemoryError:
            raise
        except BaseException:  # a panic of the library is not an Exception
            return (), b""

    def _look_ahead(self, matcher: llguidance.LLMatcher) -> tuple[tuple[int, ...], bytes]:
        likely = matcher.compute_ff_tokens()[: self._most_forced]
        if not likely:
            return (), b""
        ahead, forced = matcher.deep_copy(), []
        allowed = self._allowed(ahead)
        for token in likely:
            if token >= self._vocab_size or allowed != self._sole(token):
                break
            ahead.consume_token(token)
            forced.append(token)
            if ahead.is_stopped():
                return tuple(forced), b""
            allowed = self._allowed(ahead)
        return tuple(forced), b"" if ahead.is_error() or not any(allowed) else allowed

    def _sole(self, token: int) -> bytes:
        """As `_allowed` where nothing but this token is."""
        marks = np.zeros(self._vocab_size, dtype=np.uint8)
        marks[token] = 1
        return np.packbits(marks, bitorder="little").tobytes()

    def _allowed(self, matcher: llguidance.LLMatcher) -> bytes:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        marks = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little")
        allowed, end = marks[:-1], marks[-1]
        allowed[self._ends] = end
        return np.packbits(allowed, bitorder="little").tobytes()

    def _memory(self, closely: bool) -> int:
        """What it holds beyond what it began with."""
        own = own_bytes()
        if closely:
            self._unshared = private_bytes() - self._at_first - own
        return max(0, own + self._unshared)

    def _send(self, message: FromGrammar) -> None:
        self._connection.sendall(encode(message))


def quiet() -> None:
    """Let nothing be printed: a panic of the library is told to its client, not to the server's log."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
