"""What a grammar says of tokens that may prove wrong, and that asking it changes nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from grammars.conftest import END
from grammars.drawing import PATIENCE_S, answered
from grammars.processes import children, host_of, until
from grammars.test_following import SCHEMA, single
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc_serve.grammars.constraint import Constraint
from dsc_serve.grammars.follower import GrammarLimits, Grammars
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

ASKED = [
    StructuredOutputs(json=json.dumps(SCHEMA), disable_any_whitespace=True),
    StructuredOutputs(regex="[0-9]{3}-[0-9]{4}( and more)?"),
    StructuredOutputs(choice=("a long choice of words", "a longer one", "another")),
]


@pytest.fixture(scope="module")
def drafted(bytes_tokenizer: Tokenizer) -> Iterator[Grammars]:
    """Grammars that tell what must follow, too."""
    limits = GrammarLimits(timeout_s=60.0, most_forced=3)
    made = Grammars(bytes_tokenizer, bytes_tokenizer.vocab_size, (END,), limits)
    yield made
    made.close()


def foreseen(constraint: Constraint, tokens: list[int]) -> int:
    """After how many of the tokens it is known what may follow, once all is."""
    constraint.foresee(tokens)
    assert constraint.wait(lambda: not constraint.looking, PATIENCE_S)
    return constraint.foreseen


def path(grammars: Grammars, asked: StructuredOutputs, seed: int, most: int = 40) -> tuple[list[int], list[np.ndarray]]:
    """Tokens drawn evenly from what may follow, and what that was before each of them and at last."""
    constraint, draw = grammars.constraint(asked), np.random.default_rng(seed)
    tokens: list[int] = []
    allowed = []
    while not answered(constraint).complete and len(tokens) < most:
        allowed.append(constraint.allowed)
        choice = np.flatnonzero(allowed[-1])
        tokens.append(int(draw.choice(choice[choice != END] if (choice != END).any() else choice)))
        if tokens[-1] == END:
            tokens.pop()
            break
        constraint.push(tokens[-1])
    constraint.close()
    return tokens, allowed


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), data=st.data())
@pytest.mark.parametrize("asked", ASKED, ids=["json", "regex", "choice"])
def test_what_is_foreseen_is_what_is_said_when_it_comes(
    drafted: Grammars, asked: StructuredOutputs, seed: int, data: st.DataObject
) -> None:
    """Anywhere, over what must follow and what need not, right up to a token that may not; and nothing is changed."""
    tokens, allowed = path(drafted, asked, seed)
    constraint = drafted.constraint(asked)
    at = 0
    while at < len(tokens) - 1:
        size = data.draw(st.integers(1, min(6, len(tokens) - 1 - at)))
        wrong = data.draw(st.sampled_from([None, None, 0, size - 1]))
        drafts = tokens[at : at + size]
        if wrong is not None:
            forbidden = np.flatnonzero(~allowed[at + wrong])
            drafts[wrong] = int(forbidden[seed % len(forbidden)])
        answered(constraint)
        known = foreseen(constraint, drafts)
        assert known == (size if wrong is None else wrong)
        for ahead in range(known + 1):
            np.testing.assert_array_equal(constraint.allowed_after(ahead), allowed[at + ahead])
        step = data.draw(st.integers(1, size))
        constraint.extend(tokens[at : at + step])
        at += step
        np.testing.assert_array_equal(answered(constraint).allowed, allowed[at])
    constraint.close()


def test_nothing_is_foreseen_behind_the_end(drafted: Grammars, bytes_tokenizer: Tokenizer) -> None:
    a, b = (single(bytes_tokenizer, letter) for letter in "ab")
    constraint = answered(drafted.constraint(StructuredOutputs(regex="[ab]{2}")))
    assert foreseen(constraint, [a, b, a, b]) == 1


def test_what_must_follow_is_not_asked_for(drafted: Grammars) -> None:
    constraint = answered(drafted.constraint(StructuredOutputs(choice=("abcdefghijklmnop" * 4,))))
    forced = constraint.forced(8)
    assert forced
    assert constraint.grammar is not None
    constraint.foresee(forced)
    assert not constraint.looking and constraint.foreseen == len(forced)
    assert not constraint.grammar.pending
    constraint.foresee([forced[0] + 1])
    assert constraint.looking


def test_an_answer_does_not_wait_for_what_is_foreseen(
    make: Callable[..., Grammars], bytes_tokenizer: Tokenizer
) -> None:
    """A look is left where something else is asked, of whichever output."""
    grammars = make(timeout_s=60.0)
    asked = StructuredOutputs(regex="[ab]{5000}")
    a = single(bytes_tokenizer, "a")
    looking, other = answered(grammars.constraint(asked)), answered(grammars.constraint(asked))
    looking.foresee([a] * 4000)
    other.push(a)
    answered(other)
    assert looking.wait(lambda: not looking.looking, PATIENCE_S)
    assert looking.foreseen < 4000
    for ahead in (0, looking.foreseen):
        assert looking.allowed_after(ahead)[a]


def test_a_look_is_taken_back_by_the_next(drafted: Grammars, bytes_tokenizer: Tokenizer) -> None:
    a, b = (single(bytes_tokenizer, letter) for letter in "ab")
    constraint = answered(drafted.constraint(StructuredOutputs(regex="(a[0-9]|b[xyz]){9}")))
    x, one = single(bytes_tokenizer, "x"), single(bytes_tokenizer, "1")
    for _ in range(20):
        constraint.foresee([a, one])  # what is said of these comes while the next is asked
        assert foreseen(constraint, [b, x]) == 2
        assert constraint.allowed_after(1)[x] and not constraint.allowed_after(1)[one]


def test_what_drafts_take_is_not_held_against_an_output(drafted: Grammars, bytes_tokenizer: Tokenizer) -> None:
    """Being late ends a request: only what it has to be answered counts."""
    constraint = answered(drafted.constraint(ASKED[0]))
    grammar = constraint.grammar
    assert grammar is not None
    brace = single(bytes_tokenizer, "{")
    before = constraint.used_s
    for _ in range(200):
        foreseen(constraint, [brace])
    assert grammar.looked_s > 0
    after = constraint.used_s
    assert before is not None and after is not None
    assert after - before < grammar.looked_s + 0.05


def test_who_looked_when_its_process_ended_never_does_again(make: Callable[..., Grammars]) -> None:
    """It goes on as without drafts, and nobody else is to blame."""
    grammars = make(timeout_s=60.0)
    asked = StructuredOutputs(regex="[ab]{30}")
    first, second = answered(grammars.constraint(asked)), answered(grammars.constraint(asked))
    grammar = first.grammar
    host = host_of(grammars)
    (process,) = children(host)
    token = int(first.allowed.nonzero()[0][0])
    with grammars._inner.lock:  # so that the link hears nothing
        os.kill(process, signal.SIGSTOP)
        first.foresee([token])
        os.kill(process, signal.SIGKILL)
    until(lambda: first.grammar is not grammar, "nobody saw it end")
    for constraint, foresees in ((first, False), (second, True)):
        assert answered(constraint).error == ""
        assert constraint.foresees == foresees
        constraint.foresee([token])
        assert constraint.looking == foresees
        constraint.extend([token])
        assert answered(constraint).allowed[token]


def test_a_grammar_behind_all_others_is_asked_of_no_drafts(drafted: Grammars) -> None:
    constraint = answered(drafted.constraint(StructuredOutputs(regex="[ab]{31}")))
    assert constraint.foresees
    constraint.demote()
    assert not constraint.foresees
    constraint.foresee([1])
    assert not constraint.looking and constraint.foreseen == 0
    constraint.close()
