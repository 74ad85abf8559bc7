"""Structured outputs as the engine uses them: asks for grammars, follows outputs through them, and never waits."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import msgspec

from dsc_serve.grammars.constraint import Constraint
from dsc_serve.grammars.faults import GrammarsFullError, GrammarsLostError
from dsc_serve.grammars.grammar import Grammar, Told
from dsc_serve.grammars.link import Link, grammar_sockets
from dsc_serve.grammars.memory import look_pause_s
from dsc_serve.grammars.messages import Begin, Compiled, Demote, Ended, Forked, FromGrammar, encode
from dsc_serve.grammars.refusals import Refusals
from dsc_serve.grammars.schema import FIELD
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

MOST_KEPT = 32  # compiled grammars that nobody follows at the moment
REMEMBERED = 0.75  # of the time it has: what took less of the processor was held up by others
MOST_WAITING = 64  # grammars that have not been compiled yet
MOST_LIVE = 512  # grammars that have a process, or wait for one
STARTED_S = 60.0  # for a host to start, and all that waits before one, when somebody does wait
TURN_S = 10.0  # for a grammar to get its turn to be compiled, where a request has begun already


class GrammarLimits(msgspec.Struct, frozen=True):
    """What a grammar may take."""

    timeout_s: float = 2.0  # seconds to compile it
    memory_bytes: int = 192 * 2**20  # while it is compiled or followed
    # of all grammars together; those that nobody follows go first, then the largest. What is seen above it is ended at
    # once, and looks come so often that it is never more than `memory_bytes` above
    kept_bytes: int = 512 * 2**20
    # tokens that must follow, of which an answer tells, for drafts; each costs another answer's time
    most_forced: int = 0


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
        """Have a grammar compiled; `told` is called, perhaps by another thread, with what is wrong or None.

        Returns what to call when nobody wants to know any more. Raises GrammarsFullError, GrammarsLostError.
        """
        return self._inner.check(asked, told)

    def compile(self, asked: StructuredOutputs) -> None:
        """Wait until a grammar can be used. Raises ParameterError when it cannot, GrammarsLostError where nobody can
        say, and GrammarsFullError.
        """
        done = threading.Event()
        faults: list[Exception | None] = []

        def told(fault: Exception | None) -> None:
            faults.append(fault)
            done.set()

        cancel = self._inner.check(asked, told)
        if not done.wait(STARTED_S):
            cancel()
            raise GrammarsLostError(f"{FIELD} cannot be used: no answer came within {STARTED_S:g} s")
        if faults[0] is not None:
            raise faults[0]

    def constraint(self, asked: StructuredOutputs) -> Constraint:
        """The state at the start of an output.

        Raises ParameterError when the grammar is known not to work, GrammarsFullError and GrammarsLostError.
        """
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
        self.compile_limit_s = limits.timeout_s + TURN_S
        self.lock = threading.Condition(threading.RLock())
        self.by_id: dict[int, Grammar] = {}
        self._tokenizer, self._ends, self._limits = tokenizer, ends, limits
        self._by_key: dict[bytes, Grammar] = {}
        self._refusals = Refusals()
        self._ids, self._uses = itertools.count(), itertools.count()
        self._look_at = 0.0  # monotonic seconds
        self._link: Link | None = None
        self._closed = False

    def start(self) -> Link:
        """Nothing is waited for: the link's thread does what takes long. Raises GrammarsLostError, OSError and
        RuntimeError.
        """
        with self.lock:
            if self._closed:
                raise GrammarsLostError("these grammars are closed")
            if self._link is None or self._link.closed:
                self._link = Link(self._begin, self)
            return self._link

    def close(self) -> None:
        with self.lock:
            self._closed, link = True, self._link
        if link is not None:
            link.close()
        with self.lock:
            for grammar in list(self.by_id.values()):
                self._lose(grammar, "the engine ends")
            self.lock.notify_all()

    def check(self, asked: StructuredOutputs, told: Told) -> Callable[[], None]:
        key = digest(asked)
        with self.lock:
            error = self._remembered(key)
            grammar = None if error else self._get(key, asked)
            if grammar is None or grammar.compiled:
                told(ParameterError(FIELD, error) if error else None)
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

    def give_up(self, constraint: Constraint, error: str, blameless: bool) -> None:
        with self.lock:
            constraint.fail(error, blameless)
            grammar = constraint.grammar
            self.close_output(constraint)
            if grammar is not None and grammar.compiled and constraint.output in grammar.pending:
                self._kill(grammar, "an output of it took too long")

    def demote(self, grammar: Grammar) -> None:
        with self.lock:
            grammar.demoted = True
            grammar.link.send(Demote(grammar.id))

    def close_output(self, constraint: Constraint) -> None:
        with self.lock:
            grammar, constraint.grammar = constraint.grammar, None
            if grammar is not None and grammar.outputs.pop(constraint.output, None) is not None:
                grammar.drop(constraint.output)
                if grammar.idle and (constraint.output in grammar.pending or not grammar.compiled or grammar.demoted):
                    self._kill(grammar, "nobody wants it any more")  # what it computes is for nobody
                self._tidy()

    def _begin(self) -> Begin:
        limits, text = self._limits, self._tokenizer.to_json()
        return Begin(text, self.vocab_size, self._ends, limits.timeout_s, limits.memory_bytes, limits.most_forced)

    def _attach(self, constraint: Constraint) -> None:
        grammar = self._get(digest(constraint.asked), constraint.asked)
        constraint.grammar = grammar
        constraint.forget_answers()
        if grammar.idle:
            grammar.link.poke()  # it is looked at from now on
        grammar.outputs[constraint.output] = constraint
        grammar.open(constraint.output, constraint.tokens)

    def _get(self, key: bytes, asked: StructuredOutputs) -> Grammar:
        grammar = self._by_key.get(key)
        if grammar is not None and grammar.demoted:
            # It keeps its low rank, which only root may raise again; who comes now is not to suffer from who was late.
            del self._by_key[key]
            grammar = None
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
                grammar = Grammar(next(self._ids), key, asked, ours, link)
                link.compile(grammar, theirs)
            except BaseException:
                ours.close()
                theirs.close()
                raise
        except (OSError, RuntimeError) as error:  # no descriptor, process or thread can be had: nobody else's fault
            raise GrammarsLostError(f"no process can be had for a grammar: {error}") from error
        self.by_id[grammar.id] = self._by_key[key] = grammar
        return grammar

    def _remembered(self, key: bytes) -> str:
        """What is known to be wrong with a grammar, or "": what took too long of late, or anything with a tokenizer
        that no grammar can follow.
        """
        if not self._tokenizer.local:
            return f"{FIELD} cannot be used: with this model's tokenizer a token's text depends on those around it"
        return self._refusals.get(key)

    def _cancel(self, grammar: Grammar, told: Told) -> None:
        with self.lock:
            if told in grammar.waiters:
                grammar.waiters.remove(told)
                if grammar.idle and not grammar.compiled:
                    self._kill(grammar, "nobody wants it any more")

    def _kill(self, grammar: Grammar, why: str, at_once: bool = False) -> None:
        """The host will say that it has ended; nobody new joins it until then."""
        if self._by_key.get(grammar.key) is grammar:
            del self._by_key[grammar.key]
        grammar.kill(why, at_once)

    def look(self) -> float | None:
        with self.lock:
            if all(grammar.idle and not grammar.ending for grammar in self.by_id.values()):
                return None
            now = time.monotonic()
            if now >= self._look_at:
                for grammar in self.by_id.values():
                    grammar.measure()
                room = self._tidy()
                self._look_at = now + look_pause_s(room, self._limits.memory_bytes)
            return self._look_at - now

    def _tidy(self) -> int:
        """Hang up on grammars that nobody follows, the longest unused first, until the rest is within the limits; then
        end the largest. Returns the bytes that are left, below 0 until those that are ending have ended.
        """
        most = self._limits.kept_bytes
        idle = sorted(
            (grammar for grammar in self.by_id.values() if grammar.idle and grammar.compiled and not grammar.ending),
            key=lambda grammar: grammar.used,
        )
        room = most - sum(grammar.memory_bytes for grammar in self.by_id.values())
        while idle and (len(idle) > MOST_KEPT or room < 0):
            grammar = idle.pop(0)
            room += grammar.memory_bytes
            self._forget(grammar)
        if room >= 0:
            return room
        excess = -room
        for grammar in sorted(self.by_id.values(), key=lambda grammar: (not grammar.ending, -grammar.memory_bytes)):
            if excess <= 0:
                break
            excess -= grammar.memory_bytes
            if not grammar.ending:
                why = f"all grammars together take more than {most >> 20} MiB, and this one most of it"
                for constraint in grammar.outputs.values():
                    constraint.fail(f"{FIELD} cannot be followed further: {why}")
                self._kill(grammar, why, at_once=True)
            elif not grammar.hurried:
                self._kill(grammar, grammar.ending, at_once=True)
        return room

    def _forget(self, grammar: Grammar) -> None:
        self.by_id.pop(grammar.id, None)
        if self._by_key.get(grammar.key) is grammar:
            del self._by_key[grammar.key]
        grammar.link.forget(grammar)

    def heard(self, grammar: Grammar, message: FromGrammar) -> None:
        grammar.memory_bytes = message.memory_bytes
        if isinstance(message, Compiled):
            grammar.compiled = True
            if message.error:
                self._refused(grammar, message.error)
                return
            self._tell(grammar, None)
        else:
            if not message.fits(-(-self.vocab_size // 8)):
                self.broken(grammar)
                return
            grammar.answered(message)
            if message.output in grammar.outputs:
                grammar.outputs[message.output].take(message)
        self._tidy()

    def forked(self, message: Forked) -> None:
        grammar = self.by_id.get(message.grammar)
        if grammar is not None:
            grammar.pid, grammar.bytes_at_first = message.pid, message.bytes_at_first

    def broken(self, grammar: Grammar) -> None:
        if grammar.id in self.by_id:
            grammar.blameless = True
            self._kill(grammar, "its process sent what cannot be read")

    def ended(self, message: Ended) -> None:
        grammar = self.by_id.get(message.grammar)
        if grammar is None:
            return
        grammar.link.drain(grammar)  # what it said last comes by another way, and counts first
        if grammar.id not in self.by_id:
            return
        self._forget(grammar)
        reason = grammar.ending or message.reason or "its process ended"
        error = f"{FIELD} cannot be used: {reason}"
        if grammar.blameless or (message.blameless and not grammar.ending):
            self._lose(grammar, reason)
            return
        if not grammar.compiled and not grammar.ending:
            if message.cpu_s >= REMEMBERED * self._limits.timeout_s or "MiB" in reason:
                self._refusals.add(grammar.key, error)
            self._refused(grammar, error)
            return
        if not grammar.ending and message.output in grammar.outputs:  # what it was computing is to blame
            grammar.outputs[message.output].fail(f"{FIELD} cannot be followed further: {reason}")
        self._tell(grammar, ParameterError(FIELD, error))
        self._begin_anew(grammar)

    def lost(self, link: Link) -> None:
        for grammar in [grammar for grammar in self.by_id.values() if grammar.link is link]:
            self._lose(grammar, "the process that compiles grammars has ended")

    def _refused(self, grammar: Grammar, error: str) -> None:
        """It cannot be used, by whomever."""
        for constraint in grammar.outputs.values():
            constraint.fail(error)
        grammar.outputs.clear()
        self._forget(grammar)
        self._tell(grammar, ParameterError(FIELD, error))

    def _lose(self, grammar: Grammar, why: str) -> None:
        """It is no more, which is nobody's fault."""
        self._forget(grammar)
        self._tell(grammar, GrammarsLostError(f"{FIELD} cannot be used now: {why}; try again"))
        self._begin_anew(grammar)

    def _begin_anew(self, grammar: Grammar) -> None:
        """Outputs that are not to blame follow a new process from their first token; once, until that has answered."""
        outputs, grammar.outputs = grammar.outputs, {}
        for constraint in outputs.values():
            constraint.grammar = None
            if constraint.error:
                continue
            if constraint.retried or self._closed:
                constraint.fail(f"{FIELD} cannot be followed further: its process has ended; try again", blameless=True)
                continue
            constraint.retried = True
            try:
                self._attach(constraint)
            except Exception as error:  # whatever it is, the others are still to be told
                constraint.fail(f"{FIELD} cannot be followed further: {error}", blameless=True)

    def _tell(self, grammar: Grammar, fault: ParameterError | GrammarsLostError | None) -> None:
        waiters, grammar.waiters = grammar.waiters, []
        for told in waiters:
            told(fault)


def digest(asked: StructuredOutputs) -> bytes:
    return hashlib.blake2b(encode(asked), digest_size=16).digest()
