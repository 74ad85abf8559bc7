"""How far one request's output has come in its grammar, and what may follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsc_serve.grammars.memory import processor_s
from dsc_serve.grammars.messages import Answer, Foreseen, Push
from dsc_serve.grammars.schema import FIELD
from dsc_serve.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from dsc_serve.grammars.follower import _Grammars
    from dsc_serve.grammars.grammar import Grammar


@dataclass(slots=True)
class Lookahead:
    """What may follow drafted tokens, as it comes."""

    number: int
    known: int  # the first of them, of which that was known before
    allowed: list[bytes] = field(default_factory=list)
    ended: bool = False  # no more comes


class Constraint:
    """How far one request's output has come in its grammar.

    The grammar's answer for the tokens so far comes by itself: `ready` once it is there. Its fields then say what may
    follow. error: why it cannot go on; blameless: and whether that is nobody's fault who asked for it. late_s: seconds
    that it has computed, or run behind all others, while steps went on without this request. retried: whether it has
    begun anew, since its process ended, and not been answered since.
    """

    def __init__(self, grammars: _Grammars, asked: StructuredOutputs, output: int) -> None:
        self.asked, self.output = asked, output
        self.tokens: list[int] = []
        self.grammar: Grammar | None = None
        self.error = ""
        self.blameless = False
        self.late_s = 0.0
        self.retried = False
        self.answered_at = 0.0  # monotonic seconds
        self._grammars = grammars
        self._fresh = True  # whether what is known is what the present process says
        self._known: dict[int, bytes | int] = {}  # by number of tokens, what may follow: one token, or bits
        self._complete_at = -1
        self._ahead = Lookahead(0, 0, ended=True)
        self._looks = True  # whether it may ask of drafts: not once a process has ended over them

    @property
    def ready(self) -> bool:
        """Whether it is known what may follow, or that nothing can."""
        return bool(self.error) or (self._fresh and len(self.tokens) in self._known)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._complete_at == len(self.tokens)

    @property
    def compiled(self) -> bool:
        """Whether the grammar is there, so that only its answer can be late."""
        return self.grammar is not None and self.grammar.compiled

    @property
    def demoted(self) -> bool:
        return self.grammar is not None and self.grammar.demoted

    @property
    def used_s(self) -> float | None:
        """Seconds of the processor that its grammar has answered for so far; None where that is not known."""
        if self.grammar is None or not self.grammar.pid:
            return None
        used_s = processor_s(self.grammar.pid)
        return None if used_s is None else used_s - self.grammar.looked_s

    @property
    def compile_limit_s(self) -> float:
        """Seconds after which nobody need wait for the grammar any longer."""
        return self._grammars.compile_limit_s

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may follow, bool [vocabulary]; for a constraint that is ready and not complete."""
        return self.allowed_after(0)

    def allowed_after(self, ahead: int) -> NDArray[np.bool_]:
        """The same, once so many of the tokens that `foresee` was told of have followed, at most `foreseen`."""
        look, size = self._ahead, self._grammars.vocab_size
        found = ahead - look.known
        known = look.allowed[found - 1] if ahead and found > 0 else self._known[len(self.tokens) + ahead]
        if isinstance(known, int):
            allowed = np.zeros(size, dtype=np.bool_)
            allowed[known] = True
            return allowed
        bits = np.frombuffer(known, dtype=np.uint8)
        return np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)

    def forced(self, most: int) -> list[int]:
        """At most so many tokens that must follow, as far as it is known what may follow each of them."""
        found: list[int] = []
        count, known = len(self.tokens), self._known
        while self._fresh and len(found) < most and isinstance(token := known.get(count), int) and count + 1 in known:
            found.append(token)
            count += 1
        return found

    @property
    def foresees(self) -> bool:
        """Whether it can be asked what may follow tokens that need not follow."""
        return self._looks and not self.error and self.grammar is not None and not self.grammar.demoted

    @property
    def foreseen(self) -> int:
        """After how many of the tokens that `foresee` was told of it is known what may follow."""
        return self._ahead.known + len(self._ahead.allowed)

    @property
    def looking(self) -> bool:
        """Whether more of that is to come."""
        return not self._ahead.ended and not self.error

    def foresee(self, tokens: Sequence[int]) -> None:
        """Ask what may follow each of these tokens, should they follow the output. The next call takes that back.

        Nothing is asked where they must follow, and it is known what may follow each of them.
        """
        with self._grammars.lock:
            count, known, size = len(self.tokens), self._known, 0
            while self._fresh and size < len(tokens):
                if known.get(count + size) != tokens[size] or count + size + 1 not in known:
                    break
                size += 1
            asked = size < len(tokens) and self.foresees
            self._ahead = Lookahead(self._ahead.number + 1, size, ended=not asked)
            if asked and self.grammar is not None:
                self.grammar.look(self.output, self._ahead.number, tokens, size)

    def push(self, token: int) -> None:
        """The output has grown by a token."""
        with self._grammars.lock:
            self.tokens.append(token)
            if self.grammar is not None and not self.error:
                self.grammar.push(self.output, token)

    def extend(self, tokens: Sequence[int]) -> None:
        """The output has grown by several tokens."""
        with self._grammars.lock:
            self.tokens.extend(tokens)
            if self.grammar is not None and not self.error:
                self.grammar.pending.append(self.output)
                self.grammar.send(Push(self.output, list(tokens)))

    def take(self, answer: Answer | Foreseen) -> None:
        """Under the grammars' lock."""
        if isinstance(answer, Foreseen):
            if answer.number == self._ahead.number:
                self._ahead.allowed += answer.allowed
                self._ahead.ended = answer.last
            return
        if answer.complete:
            self._complete_at = answer.count
        self.error = self.error or answer.error
        self.retried = False
        self.answered_at = time.monotonic()
        # Who looks without the lock must find what was known of later tokens, and all the rest, there.
        known: dict[int, bytes | int] = {answer.count: answer.allowed}
        if self._fresh:
            known |= {count: value for count, value in self._known.items() if count > answer.count}
        known |= dict(enumerate(answer.forced, answer.count))
        if answer.after:
            known[answer.count + len(answer.forced)] = answer.after
        self._known, self._fresh = known, True

    def forget_answers(self) -> None:
        """Another process answers from now on. Who waits for what the last one was to foresee waits in vain."""
        self._fresh = False
        self._looks = self._looks and self._ahead.ended
        self._ahead.ended = True

    def fail(self, why: str, blameless: bool = False) -> None:
        """It cannot go on; the first reason stands. Under the grammars' lock."""
        if not self.error:
            self.blameless, self.error = blameless, why

    def wait(self, enough: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for news of any grammar until there is enough of it."""
        with self._grammars.lock:
            return self._grammars.lock.wait_for(enough, timeout_s)

    def give_up(self, why: str, blameless: bool = False) -> None:
        """It has taken too long. What it keeps computing is ended; other outputs of its grammar begin anew."""
        self._grammars.give_up(self, f"{FIELD} cannot be followed further: {why}", blameless)

    def demote(self) -> None:
        """Put its grammar behind all others. Safe to call again and again."""
        if self.grammar is not None and not self.grammar.demoted:
            self._grammars.demote(self.grammar)

    def close(self) -> None:
        """Nobody follows it any more. Safe to call twice."""
        self._grammars.close_output(self)


class ConstraintAhead:
    """Where a constraint stands once so many of the tokens that it foresees have followed."""

    def __init__(self, constraint: Constraint, ahead: int) -> None:
        self._constraint, self._ahead = constraint, ahead

    @property
    def error(self) -> str:
        return self._constraint.error

    @property
    def allowed(self) -> NDArray[np.bool_]:
        return self._constraint.allowed_after(self._ahead)

    @property
    def ready(self) -> bool:
        """Whether it is known what may follow."""
        return bool(self.error) or self._constraint.foreseen >= self._ahead

    @property
    def settled(self) -> bool:
        """Whether nothing more becomes known."""
        return self.ready or not self._constraint.looking

    def wait(self, enough: Callable[[], bool], timeout_s: float) -> bool:
        """As `Constraint.wait`."""
        return self._constraint.wait(enough, timeout_s)


def wait(constraints: Sequence[Constraint], timeout_s: float, enough: Callable[[Iterable[object]], bool] = all) -> bool:
    """Wait until all of these, at least one, are ready; with `any` until one of them is. Returns whether they are."""
    return constraints[0].wait(lambda: enough(constraint.ready for constraint in constraints), timeout_s)
