"""How far one request's output has come in its grammar, and what may follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsc_serve.grammars.memory import processor_s
from dsc_serve.grammars.messages import Answer
from dsc_serve.grammars.schema import FIELD
from dsc_serve.sampling_params import StructuredOutputs

if TYPE_CHECKING:
    from dsc_serve.grammars.follower import _Grammars
    from dsc_serve.grammars.grammar import Grammar


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
        self.complete = False
        self.error = ""
        self.blameless = False
        self.late_s = 0.0
        self.retried = False
        self.answered_at = 0.0  # monotonic seconds
        self._grammars = grammars
        self._answered = -1
        self._bits = b""

    @property
    def ready(self) -> bool:
        """Whether it is known what may follow, or that nothing can."""
        return bool(self.error) or self._answered == len(self.tokens)

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
        return None if self.grammar is None or not self.grammar.pid else processor_s(self.grammar.pid)

    @property
    def compile_limit_s(self) -> float:
        """Seconds after which nobody need wait for the grammar any longer."""
        return self._grammars.compile_limit_s

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may follow, bool [vocabulary]; for a constraint that is ready and not complete."""
        bits = np.frombuffer(self._bits, dtype=np.uint8)
        return np.unpackbits(bits, count=self._grammars.vocab_size, bitorder="little").view(np.bool_)

    def push(self, token: int) -> None:
        """The output has grown by a token."""
        with self._grammars.lock:
            self.tokens.append(token)
            if self.grammar is not None and not self.error:
                self.grammar.push(self.output, token)

    def take(self, answer: Answer) -> None:
        """Under the grammars' lock."""
        self._bits, self.complete = answer.allowed, answer.complete
        self.error = self.error or answer.error
        self.retried = False
        self.answered_at = time.monotonic()
        self._answered = answer.count  # last: who looks without the lock must find the rest there

    def forget_answers(self) -> None:
        self._answered = -1

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


def wait(constraints: Sequence[Constraint], timeout_s: float, enough: Callable[[Iterable[object]], bool] = all) -> bool:
    """Wait until all of these, at least one, are ready; with `any` until one of them is. Returns whether they are."""
    return constraints[0].wait(lambda: enough(constraint.ready for constraint in constraints), timeout_s)
