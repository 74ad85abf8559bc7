"""Whose fault the end of a grammar's process is, and that nobody else is told so."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable

import pytest
from grammars.drawing import PATIENCE_S, answered
from grammars.processes import children, host_of, quick, slow, until

from dsc_serve.grammars import link
from dsc_serve.grammars.constraint import Constraint
from dsc_serve.grammars.faults import GrammarsLostError
from dsc_serve.grammars.follower import GrammarLimits, Grammars
from dsc_serve.grammars.grammar import Grammar
from dsc_serve.grammars.messages import Ended
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

LETTERS = StructuredOutputs(regex="[ab]{30}")


def grammar_of(constraint: Constraint) -> Grammar:
    assert constraint.grammar is not None
    return constraint.grammar


def follow(constraint: Constraint) -> None:
    """Go on by a token."""
    constraint.push(int(answered(constraint).allowed.nonzero()[0][0]))


def test_a_client_hears_its_own_fault_even_where_the_end_is_told_before(make: Callable[..., Grammars]) -> None:
    """The two come by different ways; and what the process had not read must not hide what it had sent."""
    grammars = make()
    host = host_of(grammars)
    until(lambda: len(children(host)) == 0, "something runs")
    with grammars._inner.lock:  # so that the link hears nothing
        told: list[Exception | None] = []
        grammars.check(StructuredOutputs(regex="(a"), told.append)
        constraint = grammars.constraint(StructuredOutputs(regex="(a"))
        grammar = grammar_of(constraint)
        assert select.select([grammar.connection], [], [], PATIENCE_S)[0], "nothing was said"
        until(lambda: len(children(host)) == 0, "it is still there")
        grammars._inner.ended(Ended(grammar.id, "", 0.0))
    assert "unclosed group" in constraint.error and not constraint.blameless
    (fault,) = told
    assert isinstance(fault, ParameterError) and "unclosed group" in str(fault)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_who_comes_after_a_process_has_ended_is_not_to_blame(
    make: Callable[..., Grammars], number: signal.Signals
) -> None:
    grammars = make()
    first = answered(grammars.constraint(LETTERS))
    host = host_of(grammars)
    (process,) = children(host)
    with grammars._inner.lock:  # so that the link hears nothing
        os.kill(process, number)
        until(lambda: len(children(host)) == 0, "it is still there")
        second = grammars.constraint(LETTERS)
        grammar = grammar_of(first)
        assert second.grammar is grammar
    until(lambda: grammar_of(first) is not grammar, "nobody saw it end")
    for constraint in (first, second):
        assert answered(constraint).error == ""


def test_an_output_outlives_any_number_of_processes_that_answer(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraint = grammars.constraint(LETTERS)
    for _ in range(4):
        follow(constraint)
        answered(constraint)
        before = grammar_of(constraint)
        os.kill(children(host_of(grammars))[0], signal.SIGKILL)
        until(lambda before=before: constraint.grammar is not before, "nobody saw it end")
    assert answered(constraint).error == ""


def test_an_output_whose_process_ends_again_before_it_answers_is_told(make: Callable[..., Grammars]) -> None:
    grammars = make(timeout_s=60.0)
    constraint = grammars.constraint(slow())
    for _ in range(2):
        until(lambda: bool(children(host_of(grammars))), "it is not compiled")
        before = constraint.grammar
        os.kill(children(host_of(grammars))[0], signal.SIGKILL)
        until(lambda before=before: constraint.grammar is not before, "nobody saw it end")
    assert "its process has ended" in constraint.error and constraint.blameless


def test_the_end_of_the_host_is_nobodys_fault(make: Callable[..., Grammars]) -> None:
    grammars = make(timeout_s=60.0)
    told: list[Exception | None] = []
    grammars.check(slow(), told.append)
    until(lambda: bool(children(host_of(grammars))), "it is not compiled")
    os.kill(host_of(grammars), signal.SIGKILL)
    until(lambda: bool(told), "nobody is told")
    assert isinstance(told[0], GrammarsLostError) and "try again" in str(told[0])


def test_a_host_that_cannot_be_had_is_nobodys_fault(
    bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "HOST", ("/nowhere/to/be/found",))
    grammars = Grammars(bytes_tokenizer, bytes_tokenizer.vocab_size)
    with pytest.raises(GrammarsLostError):
        grammars.compile(quick("a"))
    constraint = answered(grammars.constraint(quick("b")))
    assert constraint.error and constraint.blameless
    monkeypatch.undo()
    grammars.compile(quick("a"))
    grammars.close()


def test_whoever_waits_when_all_is_closed_is_told(make: Callable[..., Grammars]) -> None:
    grammars = make(timeout_s=60.0)
    told: list[Exception | None] = []
    grammars.check(slow(), told.append)
    waiting, followed = grammars.constraint(slow(1)), answered(grammars.constraint(LETTERS))
    follow(followed)
    grammars.close()
    assert isinstance(told[0], GrammarsLostError)
    assert waiting.ready and waiting.error and waiting.blameless
    assert followed.error and followed.blameless
    assert grammars.live == 0
    with pytest.raises(GrammarsLostError):
        grammars.constraint(LETTERS)


def test_a_packet_that_cannot_be_read_ends_its_own_grammar_alone(
    make: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = make()
    sender, other = grammars.constraint(LETTERS), grammars.constraint(quick("other"))
    for constraint in (sender, other):
        answered(constraint)
    host, before, others = host_of(grammars), grammar_of(sender), grammar_of(other)
    monkeypatch.setattr(link, "PACKET", 16)  # what is longer is cut off
    follow(sender)
    until(lambda: sender.grammar is not before, "nobody saw it end")
    monkeypatch.undo()
    assert host_of(grammars) == host and other.grammar is others
    follow(other)
    assert answered(other).error == ""
    until(lambda: sender.ready, "no answer")
    assert sender.error == "" or sender.blameless  # its new process may have answered before packets were whole again


def test_an_answer_of_the_wrong_size_is_not_used(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraint = answered(grammars.constraint(LETTERS))
    before = grammar_of(constraint)
    with grammars._inner.lock:
        grammars._inner.vocab_size += 8
        follow(constraint)
    until(lambda: constraint.grammar is not before, "nobody saw it end")


def test_what_found_no_room_is_sent_when_there_is_some(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraint = answered(grammars.constraint(LETTERS))
    grammar = grammar_of(constraint)
    (process,) = children(host_of(grammars))
    os.kill(process, signal.SIGSTOP)
    with grammars._inner.lock:
        while len(grammar.unsent) < 3:
            grammar.drop(10**9)  # which nobody answers
    assert grammar.unsent
    os.kill(process, signal.SIGCONT)
    until(lambda: not grammar.unsent, "it is never sent")
    follow(constraint)
    assert answered(constraint).error == ""


def test_nobody_waits_for_a_host_to_start(bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the first: a large tokenizer takes seconds to write, and a process to make."""
    go, text = threading.Event(), bytes_tokenizer.to_json()

    def to_json(self: Tokenizer) -> str:
        assert go.wait(PATIENCE_S)
        return text

    monkeypatch.setattr(Tokenizer, "to_json", to_json)
    grammars = Grammars(bytes_tokenizer, bytes_tokenizer.vocab_size, (), GrammarLimits(timeout_s=60.0))
    made: list[Constraint] = []
    asking = threading.Thread(target=lambda: made.append(grammars.constraint(LETTERS)))
    asking.start()
    asking.join(PATIENCE_S / 2)
    assert made, "somebody waits for the host"
    with grammars._inner.lock:
        assert not made[0].ready
    go.set()
    assert answered(made[0]).error == ""
    grammars.close()


def test_who_comes_after_a_demotion_gets_the_rank_of_others(make: Callable[..., Grammars]) -> None:
    grammars = make()
    late = answered(grammars.constraint(LETTERS))
    (process,) = children(host_of(grammars))
    late.demote()
    until(lambda: os.sched_getscheduler(process) == os.SCHED_IDLE, "it keeps its rank")
    honest = answered(grammars.constraint(LETTERS))
    (new,) = set(children(host_of(grammars))) - {process}
    assert os.sched_getscheduler(new) == os.SCHED_OTHER and os.getpriority(os.PRIO_PROCESS, new) == os.getpriority(
        os.PRIO_PROCESS, host_of(grammars)
    )
    follow(late)
    assert answered(late).error == "" and answered(honest).error == ""
    late.close()
    until(lambda: children(host_of(grammars)) == [new], "what nobody may use again is kept")
    assert answered(grammars.constraint(LETTERS)).grammar is honest.grammar


def test_what_a_grammar_has_used_of_the_processor_is_known(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraint = grammars.constraint(LETTERS)
    before = answered(constraint).used_s
    for _ in range(20):
        follow(constraint)
    after = answered(constraint).used_s
    assert before is not None and after is not None and 0 < before < after < PATIENCE_S
