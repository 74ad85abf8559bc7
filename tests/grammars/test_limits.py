"""What a grammar may take of time and memory, and that it harms nobody else."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from grammars.drawing import answered
from grammars.processes import children, host_of, large, quick, slow, until

from dsc_serve.grammars import follower, refusals
from dsc_serve.grammars.constraint import Constraint
from dsc_serve.grammars.faults import GrammarsFullError
from dsc_serve.grammars.follower import Grammars
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer


def test_what_takes_too_long_to_compile_is_ended_and_remembered(
    make: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "REMEMBERED", 0.0)  # however much of the processor others leave it
    grammars = make(timeout_s=0.5)
    grammars.compile(quick("first"))  # the host is there
    begun = time.monotonic()
    with pytest.raises(ParameterError, match=r"cannot be used: it takes longer than 0\.5 s") as error:
        grammars.compile(slow())
    assert error.value.field == "structured_outputs"
    assert time.monotonic() - begun < 30, "a minute's work was done"
    until(lambda: len(children(host_of(grammars))) == 1, "its process is still there")
    begun = time.thread_time()
    for attempt in (grammars.compile, grammars.constraint):
        with pytest.raises(ParameterError, match="longer than"):
            attempt(slow())
    assert time.thread_time() - begun < 0.1
    assert len(children(host_of(grammars))) == 1


def test_what_others_held_up_is_not_remembered(make: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = make(timeout_s=0.2)
    monkeypatch.setattr(follower, "REMEMBERED", 2.0)  # more of the processor than one thread can have had
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(ParameterError, match="longer than"):
            grammars.compile(slow())
        assert time.monotonic() - begun >= 0.2


def test_what_was_refused_may_be_asked_for_again_later(
    make: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = make(timeout_s=0.2)
    monkeypatch.setattr(follower, "REMEMBERED", 0.0)
    monkeypatch.setattr(refusals, "REFUSED_S", 0.0)
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(ParameterError, match="longer than"):
            grammars.compile(slow())
        assert time.monotonic() - begun >= 0.2


@pytest.mark.parametrize(
    "asked",
    [
        StructuredOutputs(json='{"properties": {"a": ' * 300 + "{}" + "}}" * 300),
        StructuredOutputs(regex="(" * 9000 + "a" + ")" * 9000),
        StructuredOutputs(grammar="start: " + "(" * 9000 + '"a"' + ")" * 9000),
        StructuredOutputs(json="[" * 30000),
        StructuredOutputs(json=json.dumps({"anyOf": [{"minimum": i, "maximum": 10**15 + i} for i in range(600)]})),
        StructuredOutputs(grammar='root ::= "a"' + "\n" * 30000),
    ],
    ids=["nested schema", "nested regex", "nested rules", "nested JSON", "many ranges", "many blank lines"],
)
def test_whatever_a_text_does_to_the_compiler_others_are_served(
    make: Callable[..., Grammars], asked: StructuredOutputs
) -> None:
    grammars = make(timeout_s=1.0)
    outcome: list[str] = []
    grammars.check(asked, lambda fault: outcome.append(str(fault or "")))
    grammars.compile(quick("other"))
    until(lambda: bool(outcome), "no answer")
    assert outcome[0] == "" or outcome[0].startswith("structured_outputs cannot be used: ")
    assert "\n" not in outcome[0]


def test_memory_is_bounded(make: Callable[..., Grammars]) -> None:
    grammars = make(memory_bytes=48 * 2**20, timeout_s=20.0)
    other = grammars.constraint(quick("other"))
    assert answered(other).error == ""
    followed = grammars.constraint(large())
    assert answered(followed).error.startswith("structured_outputs cannot be")
    assert "48 MiB" in followed.error
    assert answered(other).error == ""


def test_newer_grammars_go_before_those_that_take_long(make: Callable[..., Grammars]) -> None:
    grammars = make(timeout_s=60.0)
    for i in range(6):
        grammars.check(slow(i), lambda error: None)
    begun = time.monotonic()
    for i in range(10):
        grammars.compile(quick(f"name{i}"))
    assert time.monotonic() - begun < 50, "ordinary grammars wait for slow ones"


def test_too_many_waiting_grammars_are_refused(make: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = make(timeout_s=30.0)
    monkeypatch.setattr(follower, "MOST_WAITING", 3)
    for i in range(3):
        grammars.check(slow(i), lambda error: None)
    for attempt in (grammars.constraint, lambda asked: grammars.check(asked, lambda error: None)):
        with pytest.raises(GrammarsFullError):
            attempt(quick("more"))


def test_a_compilation_that_nobody_waits_for_is_stopped(make: Callable[..., Grammars]) -> None:
    grammars = make(timeout_s=60.0)
    grammars.compile(quick("kept"))
    told: list[Exception | None] = []
    cancels = [grammars.check(slow(), told.append) for _ in range(2)]
    waiting = [grammars.check(slow(i), told.append) for i in range(1, 6)]
    until(lambda: len(children(host_of(grammars))) > 2, "nothing is compiled")
    cancels[0]()
    assert grammars.live == 7  # somebody else still waits for it
    for cancel in (cancels[1], *waiting):
        cancel()
    until(lambda: grammars.live == 1, "they are still compiled")
    until(lambda: len(children(host_of(grammars))) == 1, "their processes are still there")


def test_those_used_last_are_kept(make: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = make()
    monkeypatch.setattr(follower, "MOST_KEPT", 4)
    popular = quick("popular")
    grammars.compile(popular)
    process = children(host_of(grammars))
    for i in range(8):
        grammars.compile(quick(f"rare{i}"))
        grammars.compile(popular)
    until(lambda: len(children(host_of(grammars))) == 4, "processes are left")
    assert grammars.live == 4 and process[0] in children(host_of(grammars))


def test_all_of_them_together_are_bounded(make: Callable[..., Grammars]) -> None:
    grammars = make(kept_bytes=16 * 2**20, timeout_s=30.0)
    held = grammars.constraint(quick("held"))
    for i in range(12):
        grammars.compile(quick(f"name{i}"))
    assert answered(held).error == ""
    sizes = [grammar.memory_bytes for grammar in grammars._inner.by_id.values()]
    assert sum(sizes) <= 16 * 2**20 and len(sizes) < 13
    greedy = grammars.constraint(large())
    assert "together take more than 16 MiB" in answered(greedy).error
    assert answered(held).error == "" and not held.retried


def test_a_lost_process_is_replaced_without_a_trace(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraint = grammars.constraint(StructuredOutputs(regex="[ab]{3}"))
    constraint.push(int(answered(constraint).allowed.nonzero()[0][0]))
    answered(constraint)
    before, grammar = constraint.allowed.copy(), constraint.grammar
    (process,) = children(host_of(grammars))
    os.kill(process, signal.SIGKILL)
    until(lambda: constraint.grammar is not grammar, "nobody saw it end")
    assert (answered(constraint).allowed == before).all() and constraint.error == ""


def test_a_lost_host_is_replaced(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraint = grammars.constraint(StructuredOutputs(regex="[ab]{3}"))
    before, grammar = answered(constraint).allowed.copy(), constraint.grammar
    host = host_of(grammars)
    (process,) = children(host)
    os.kill(host, signal.SIGKILL)
    until(lambda: constraint.grammar is not grammar, "nobody saw it end")
    assert (answered(constraint).allowed == before).all()
    grammars.compile(quick("new"))
    until(lambda: not Path(f"/proc/{process}").exists(), "a grammar outlived its host")


def test_an_output_that_takes_too_long_ends_alone(make: Callable[..., Grammars]) -> None:
    grammars = make(timeout_s=20.0)
    asked = large()
    late = grammars.constraint(asked)
    until(lambda: late.compiled, "it is not compiled")
    assert not late.ready
    late.give_up("it is late")
    assert late.ready and late.error == "structured_outputs cannot be followed further: it is late"
    until(lambda: not children(host_of(grammars)), "it is still computed")
    assert answered(grammars.constraint(quick("next"))).error == ""


def test_nothing_is_left_after_the_end(make: Callable[..., Grammars]) -> None:
    grammars = make()
    constraints: list[Constraint] = [grammars.constraint(quick(f"n{i}")) for i in range(3)]
    for constraint in constraints:
        answered(constraint).close()
        constraint.close()
    grammars.check(slow(), lambda error: None)
    host = host_of(grammars)
    until(lambda: len(children(host)) == 4, "not all are there")
    mine = children(host)
    threads = threading.active_count()
    grammars.close()
    grammars.close()
    assert threading.active_count() == threads - 1
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (host, *mine)), "processes are left")


def test_grammars_that_nobody_holds_end_by_themselves(bytes_tokenizer: Tokenizer) -> None:
    grammars = Grammars(bytes_tokenizer, bytes_tokenizer.vocab_size)
    grammars.compile(quick("a"))
    host = host_of(grammars)
    del grammars
    until(lambda: not Path(f"/proc/{host}").exists(), "the host is left")
