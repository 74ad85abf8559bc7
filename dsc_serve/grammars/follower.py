"""Structured outputs as the engine uses them: asks for grammars, follows outputs through them, and never waits."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from dsc_serve.grammars.constraint import Constraint
from dsc_serve.grammars.link import Grammar, Link, grammar_sockets
from dsc_serve.grammars.messages import Begin, Compiled, Demote, Ended, FromGrammar, Kill, encode
from dsc_serve.grammars.schema import FIELD
from dsc_serve.sampling_params import ParameterError, StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MOST_KEPT = 32  # compiled grammars that nobody follows at the moment
MOST_REFUSED = 1024  # that are remembered
REMEMBERED = 0.75  # of the time it has: what took less of the processor was held up by others
REFUSED_S = 600.0  # for so long: what was too slow on a busy machine may be asked for again
MOST_WAITING = 64  # grammars that have not been compiled yet
MOST_LIVE = 512  # grammars that have a process, or wait for one
STARTED_S = 60.0  # for a host to start, and all that waits before one, when somebody does wait
Told = Callable[[str], None]


class GrammarLimits(msgspec.Struct, frozen=True):
    """What a grammar may take.

    timeout_s: seconds to compile it. memory_bytes: while it is compiled or followed. kept_bytes: of all grammars
    together; those that nobody follows go first, then the largest.
    """

    timeout_s: float = 2.0
    memory_bytes: int = 192 * 2**20
    kept_bytes: int = 512 * 2**20


class GrammarsFullError(RuntimeError):
    """Too many grammars wait to be compiled."""


class Grammars:
    """The grammars of one tokenizer and a model's vocabulary, in processes of their own; started when first needed.

    ends: the tokens that end the model's texts; allowed where the grammar is fulfilled, and nowhere else.
    Safe to call from several threads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        ends: Sequence[int] = (),
        limits: GrammarLimits | None = None,
    ) -> None:
        self._inner = _Grammars(tokenizer, vocab_size, tuple(ends), limits or GrammarLimits())
        weakref.finalize(self, self._inner.close)

    def start(self) -> None:
        """Start the host now, so that the first grammar need not wait for it."""
        self._inner.start()

    def check(self, asked: StructuredOutputs, told: Told) -> Callable[[], None]:
        """Have a grammar compiled; `told` is called, by another thread, with what is wrong or "".

        Returns what to call when nobody wants to know any more. Raises GrammarsFullError.
        """
        return self._inner.check(asked, told)

    def compile(self, asked: StructuredOutputs) -> None:
        """Wait until a grammar can be used. Raises ParameterError when it cannot."""
        done = threading.Event()
        errors: list[str] = []

        def told(error: str) -> None:
            errors.append(error)
            done.set()

        cancel = self._inner.check(asked, told)
        if not done.wait(STARTED_S):
            cancel()
            raise ParameterError(FIELD, f"{FIELD} cannot be used: no answer came within {STARTED_S:g} s")
        if errors[0]:
            raise ParameterError(FIELD, errors[0])

    def constraint(self, asked: StructuredOutputs) -> Constraint:
        """The state at the start of an output. Raises ParameterError when the grammar is known not to work."""
        return self._inner.constraint(asked)

    @property
    def live(self) -> int:
        """Grammars that have a process, or wait for one."""
        return len(self._inner.by_id)

    def close(self) -> None:
        """End all of them. Safe to call twice."""
        self._inner.close()


class _Grammars:
    """What the thread holds on to; `Grammars` goes when nobody uses it, and takes this with it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...], limits: GrammarLimits) -> None:
        self.vocab_size = vocab_size
        self.lock = threading.Condition(threading.RLock())
        self.by_id: dict[int, Grammar] = {}
        self._tokenizer, self._ends, self._limits = tokenizer, ends, limits
        self._by_key: dict[bytes, Grammar] = {}
        self._refused: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._ids, self._uses = itertools.count(), itertools.count()
        self._link: Link | None = None
        self._closed = False

    def start(self) -> Link:
        with self.lock:
            if self._closed:
                raise RuntimeError("these grammars are closed")
            if self._link is None or self._link.closed:
                limits, text = self._limits, self._tokenizer.to_json()
                begin = Begin(text, self.vocab_size, self._ends, limits.timeout_s, limits.memory_bytes)
                self._link = Link(begin, self.lock, self._heard, self._ended, self._lost)
            return self._link

    def close(self) -> None:
        with self.lock:
            self._closed, link = True, self._link
        if link is not None:
            link.close()

    def check(self, asked: StructuredOutputs, told: Told) -> Callable[[], None]:
        key = digest(asked)
        with self.lock:
            error = self._remembered(key)
            grammar = None if error else self._get(key, asked)
            if grammar is None or grammar.compiled:
                told(error)
                return lambda: None
            grammar.waiters.append(told)
        return lambda: self._cancel(grammar, told)

    def constraint(self, asked: StructuredOutputs) -> Constraint:
        constraint = Constraint(self, asked, next(self._ids))
        with self.lock:
            error = self._remembered(digest(asked))
            if error:
                raise ParameterError(FIELD, error)
            self._attach(constraint)
        return constraint

    def give_up(self, constraint: Constraint, error: str) -> None:
        with self.lock:
            constraint.error = constraint.error or error
            grammar = constraint.grammar
            self.close_output(constraint)
            if grammar is not None and constraint.output in grammar.pending:
                self._kill(grammar, "an output of it took too long")

    def demote(self, grammar: Grammar) -> None:
        with self.lock:
            grammar.demoted = True
            if self._link is not None:
                self._link.send(Demote(grammar.id))

    def close_output(self, constraint: Constraint) -> None:
        with self.lock:
            grammar, constraint.grammar = constraint.grammar, None
            if grammar is not None and grammar.outputs.pop(constraint.output, None) is not None:
                grammar.drop(constraint.output)
                if grammar.idle and (constraint.output in grammar.pending or not grammar.compiled):
                    self._kill(grammar, "nobody wants it any more")  # what it computes is for nobody
                self._tidy()

    def _attach(self, constraint: Constraint) -> None:
        grammar = self._get(digest(constraint.asked), constraint.asked)
        constraint.grammar = grammar
        constraint.forget_answers()
        grammar.outputs[constraint.output] = constraint
        grammar.open(constraint.output, constraint.tokens)

    def _get(self, key: bytes, asked: StructuredOutputs) -> Grammar:
        grammar = self._by_key.get(key)
        if grammar is None:
            if sum(not other.compiled for other in self.by_id.values()) >= MOST_WAITING:
                raise GrammarsFullError(f"{MOST_WAITING} grammars wait to be compiled")
            grammar = self._compile(key, asked)
        grammar.used = next(self._uses)
        return grammar

    def _compile(self, key: bytes, asked: StructuredOutputs) -> Grammar:
        if len(self.by_id) >= MOST_LIVE:
            raise GrammarsFullError(f"{MOST_LIVE} grammars are followed already")
        try:
            link = self.start()
            ours, theirs = grammar_sockets()
            try:
                grammar = Grammar(next(self._ids), key, asked, ours)
                link.compile(grammar, theirs)
            except BaseException:
                ours.close()
                theirs.close()
                raise
        except (OSError, RuntimeError) as error:  # no descriptor, process or thread can be had: nobody else's fault
            raise GrammarsFullError(f"no process can be had for a grammar: {error}") from error
        self.by_id[grammar.id] = self._by_key[key] = grammar
        return grammar

    def _remembered(self, key: bytes) -> str:
        """What is known to be wrong with a grammar, or "": what took too long of late, or anything with a tokenizer
        that no grammar can follow.
        """
        if not self._tokenizer.local:
            return f"{FIELD} cannot be used: with this model's tokenizer a token's text depends on those around it"
        error, until = self._refused.get(key, ("", 0.0))
        if error and time.monotonic() > until:
            del self._refused[key]
            return ""
        return error

    def _cancel(self, grammar: Grammar, told: Told) -> None:
        with self.lock:
            if told in grammar.waiters:
                grammar.waiters.remove(told)
                if grammar.idle and not grammar.compiled:
                    self._kill(grammar, "nobody wants it any more")

    def _kill(self, grammar: Grammar, why: str) -> None:
        """The host will say that it has ended; nobody new joins it until then."""
        grammar.ending = why
        if self._by_key.get(grammar.key) is grammar:
            del self._by_key[grammar.key]
        if self._link is not None:
            self._link.send(Kill(grammar.id))

    def _tidy(self) -> None:
        """Hang up on grammars that nobody follows, the longest unused first, until the rest is within the limits."""
        idle = sorted(
            (grammar for grammar in self.by_id.values() if grammar.idle and grammar.compiled and not grammar.ending),
            key=lambda grammar: grammar.used,
        )
        held = sum(grammar.memory_bytes for grammar in self.by_id.values())
        while idle and (len(idle) > MOST_KEPT or held > self._limits.kept_bytes):
            grammar = idle.pop(0)
            held -= grammar.memory_bytes
            self._forget(grammar)
        if held > self._limits.kept_bytes:
            grammar = max(self.by_id.values(), key=lambda grammar: grammar.memory_bytes)
            if not grammar.ending:
                most = self._limits.kept_bytes >> 20
                why = f"all grammars together take more than {most} MiB, and this one most of it"
                for constraint in list(grammar.outputs.values()):
                    constraint.error = f"{FIELD} cannot be followed further: {why}"
                self._kill(grammar, why)

    def _forget(self, grammar: Grammar) -> None:
        self.by_id.pop(grammar.id, None)
        if self._by_key.get(grammar.key) is grammar:
            del self._by_key[grammar.key]
        if self._link is not None:
            self._link.forget(grammar)

    def _heard(self, grammar: Grammar, message: FromGrammar) -> None:
        grammar.memory_bytes = message.memory_bytes
        if isinstance(message, Compiled):
            grammar.compiled = True
            self._tell(grammar, message.error)
            if message.error:
                for constraint in grammar.outputs.values():
                    constraint.error = message.error
                grammar.outputs.clear()
                self._forget(grammar)
                return
        else:
            if grammar.pending and grammar.pending[0] == message.output:
                grammar.pending.popleft()
            if message.output in grammar.outputs:
                grammar.outputs[message.output].take(message)
            grammar.flush()
        self._tidy()

    def _ended(self, message: Ended) -> None:
        grammar = self.by_id.get(message.grammar)
        if grammar is None:
            return
        self._forget(grammar)
        reason = grammar.ending or message.reason or "its process ended"
        error = f"{FIELD} cannot be used: {reason}"
        if not grammar.compiled and not grammar.ending:
            if message.cpu_s >= REMEMBERED * self._limits.timeout_s or "MiB" in reason:
                self._refuse(grammar.key, error)
            for constraint in grammar.outputs.values():
                constraint.error = error
            grammar.outputs.clear()
        elif not grammar.ending and grammar.pending:  # what it was computing is to blame
            blamed = grammar.outputs.pop(grammar.pending[0], None)
            if blamed is not None:
                blamed.error = f"{FIELD} cannot be followed further: {reason}"
        self._tell(grammar, error)
        self._begin_anew(grammar)

    def _lost(self) -> None:
        log.error("the host of grammars has ended; it is started again when it is needed")
        for grammar in list(self.by_id.values()):
            self._forget(grammar)
            self._tell(grammar, f"{FIELD} cannot be used: the process that compiles grammars has ended; try again")
            self._begin_anew(grammar)

    def _begin_anew(self, grammar: Grammar) -> None:
        """Outputs that are not to blame follow a new process from their first token; once."""
        outputs, grammar.outputs = grammar.outputs, {}
        for constraint in outputs.values():
            constraint.grammar = None
            if constraint.error:
                continue
            if constraint.retried or self._closed:
                constraint.error = f"{FIELD} cannot be followed further: its process has ended"
                continue
            constraint.retried = True
            try:
                self._attach(constraint)
            except Exception as error:  # whatever it is, the others are still to be told
                constraint.error = f"{FIELD} cannot be followed further: {error}"

    def _refuse(self, key: bytes, error: str) -> None:
        self._refused[key] = (error, time.monotonic() + REFUSED_S)
        while len(self._refused) > MOST_REFUSED:
            self._refused.popitem(last=False)

    def _tell(self, grammar: Grammar, error: str) -> None:
        waiters, grammar.waiters = grammar.waiters, []
        for told in waiters:
            told(error)


def digest(asked: StructuredOutputs) -> bytes:
    return hashlib.blake2b(encode(asked), digest_size=16).digest()
