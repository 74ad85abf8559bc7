"""Adapters in memory: found, loaded off the step's thread, within a budget, never taken from who holds them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.made_adapters import MadeAdapters, put

from dsc_serve.adapter_choice import (
    AdapterChoice,
    BrokenAdapterError,
    UnknownAdapterError,
    choice_of,
    choices_of,
)
from dsc_serve.engine.adapter_folder import LOOK_S
from dsc_serve.engine.adapters import KEPT_COMPOSITIONS, PATIENCE_S
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
A, B, C = (AdapterChoice.of(name) for name in "abc")
BOTH = AdapterChoice((("a", 0.5), ("b", 2.0)))


@pytest.fixture
def made(tmp_path: Path) -> MadeAdapters:
    own = MadeAdapters(tmp_path)
    own.put(a="1", b="2", c="3")
    return own


def test_what_is_in_memory_is_had_at_once_and_is_one_object(made: MadeAdapters) -> None:
    first, again = made.get(A), made.adapters.want(A)
    assert first.lease is not None and again.lease is not None
    assert first.lease.adapter is again.lease.adapter
    assert first.lease.adapter.name == "a" and made.reader.read == ["a"]


def test_nothing_waits_for_files_in_the_thread_that_steps(made: MadeAdapters) -> None:
    inside, gate = threading.Event(), threading.Event()
    read = made.adapters.folder._read

    def slow(folder: Path) -> object:
        inside.set()
        assert gate.wait(20)
        return read(folder)

    made.adapters.folder._read = slow
    wanted = made.adapters.want(A)
    assert inside.wait(20) and not wanted.resolved
    made.adapters.resolve()
    assert not wanted.resolved
    gate.set()
    made.resolved(wanted)
    assert wanted.lease is not None


def test_the_least_recently_used_that_nobody_holds_goes(made: MadeAdapters) -> None:
    a, b = made.get(A), made.get(B)
    assert a.lease is not None and b.lease is not None
    b.lease.release()
    a.lease.release()
    made.get(A)  # and is held
    made.get(C)
    assert made.loaded() == {"a", "c"} and made.adapters.nbytes == 200
    assert made.adapters.counts.evictions == 1
    del a, b
    assert len(made.decoder.made) == 2, "what has gone is held by nobody"


def test_who_finds_no_room_waits_for_it_and_is_not_overtaken_for_ever(made: MadeAdapters) -> None:
    a, b = made.get(A), made.get(B)
    c = made.adapters.want(C)
    for _ in range(10):
        made.adapters.resolve(0.01)
    early = made.adapters.want(A)
    assert early.lease is not None and not c.resolved
    made.clock.now += PATIENCE_S
    late = made.adapters.want(A)
    assert not late.resolved, "it would keep a place from one that waits"
    for wanted in (a, early):
        assert wanted.lease is not None
        wanted.lease.release()
    made.resolved(c)
    assert c.lease is not None and not late.resolved and made.loaded() == {"b", "c"}
    assert b.lease is not None
    b.lease.release()
    made.resolved(late)
    assert made.loaded() == {"a", "c"}


def test_one_that_is_larger_than_the_budget_is_refused(made: MadeAdapters) -> None:
    made.decoder.nbytes = 201
    wanted = made.get(A)
    assert isinstance(wanted.error, BrokenAdapterError)
    assert "takes 201 bytes; adapter_bytes, for all together, is 200" in str(wanted.error)
    assert not made.decoder.made and made.adapters.nbytes == 0


@pytest.mark.parametrize("name", ["nobody", "", ".hidden", "..", "a/../a", "a\0", "file", "x" * 5000])
def test_a_name_that_is_none_is_told_with_those_that_are(made: MadeAdapters, name: str) -> None:
    (made.path / ".hidden").mkdir()
    (made.path / "file").write_text("1")
    if name:
        with pytest.raises(UnknownAdapterError, match="is not known; known: a, b, c"):
            made.adapters.want(AdapterChoice.of(name))
    assert made.adapters.names() == ["a", "b", "c"] and not made.reader.read


def test_a_broken_one_says_why_until_its_files_change(made: MadeAdapters) -> None:
    made.put(a="no tensors")
    wanted = made.get(A)
    assert isinstance(wanted.error, BrokenAdapterError) and "the file says 'no tensors'" in str(wanted.error)
    with pytest.raises(BrokenAdapterError, match="the file says 'no tensors'"):
        made.adapters.want(A)
    assert made.reader.read == ["a"], "it is not read again for every request"
    assert [info.error for info in made.adapters.infos()] == ["the file says 'no tensors'", "", ""]
    made.put(a="7")
    assert made.get(A).lease is not None


def test_whatever_a_reader_raises_is_the_adapters_fault(made: MadeAdapters) -> None:
    def fails(folder: Path) -> object:
        raise ZeroDivisionError("a bug")

    made.adapters.folder._read = fails
    assert "ZeroDivisionError: a bug" in str(made.get(A).error)


@pytest.mark.parametrize("choice", [A, BOTH, AdapterChoice(BOTH.parts, "product of sums")])
def test_an_accident_is_told_and_the_next_may_have_better_luck(
    made: MadeAdapters, choice: AdapterChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*parts: object, **others: object) -> object:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(made.decoder, "adapter", fails)
        patch.setattr(made.decoder, "summed", fails)
        error = made.get(choice).error
        assert error is not None and "could not be loaded: MemoryError: no room" in str(error)
    made.adapters.budget = 1000
    assert made.get(choice).lease is not None


def test_changed_content_is_another_adapter_and_the_old_one_stays_with_who_holds_it(made: MadeAdapters) -> None:
    old = made.get(A)
    made.put(a="11")
    new = made.get(A)
    assert old.lease is not None and new.lease is not None
    assert old.lease.adapter.digest != new.lease.adapter.digest
    assert made.adapters.nbytes == 200, "both are in memory, and both count"
    b = made.adapters.want(B)
    for _ in range(5):
        made.adapters.resolve(0.01)
    assert not b.resolved
    old.lease.release()
    del old
    made.resolved(b)
    assert made.adapters.nbytes == 200 and len(made.decoder.made) == 2


def test_one_whose_folder_is_gone_is_unknown_and_goes_when_nobody_holds_it(made: MadeAdapters) -> None:
    held = made.get(A)
    (made.path / "a" / "file").unlink()
    (made.path / "a").rmdir()
    made.clock.now += LOOK_S
    with pytest.raises(UnknownAdapterError):
        made.adapters.want(A)
    assert made.adapters.nbytes == 100
    assert held.lease is not None
    held.lease.release()
    held.lease.release()
    assert made.adapters.nbytes == 0


def test_one_that_changes_while_it_is_read_is_read_again(made: MadeAdapters) -> None:
    read = made.adapters.folder._read

    def changing(folder: Path) -> object:
        found = read(folder)
        if made.reader.read == ["a"]:
            put(made.path, "a", "123456")
        return found

    made.adapters.folder._read = changing
    wanted = made.get(A)
    assert made.reader.read == ["a", "a"] and wanted.lease is not None
    made.adapters.folder._read = read
    made.put(b="123456")
    other = made.get(B)
    assert other.lease is not None and other.lease.adapter.digest == wanted.lease.adapter.digest


def test_a_composition_holds_its_parts_and_is_one_object_for_all(made: MadeAdapters) -> None:
    first, again = made.get(BOTH), made.get(BOTH)
    assert first.lease is not None and again.lease is not None
    assert first.lease.adapter is again.lease.adapter
    assert (first.lease.adapter.kind, first.lease.adapter.rank, first.lease.adapter.name) == ("sum", 2, "a+b")
    c = made.adapters.want(C)
    for _ in range(5):
        made.adapters.resolve(0.01)
    assert not c.resolved and made.loaded() == {"a", "b"}
    first.lease.release()
    again.lease.release()
    made.resolved(c)
    assert made.adapters.nbytes == 200 and "c" in made.loaded()


@pytest.mark.parametrize("form", ["sum", "product of sums"])
def test_a_composition_whose_parts_have_no_room_together_is_refused(made: MadeAdapters, form: str) -> None:
    three = AdapterChoice((("a", 1.0), ("b", 1.0), ("c", 1.0)), form)
    wanted = made.get(three)
    assert isinstance(wanted.error, BrokenAdapterError) and "more than adapter_bytes, 200" in str(wanted.error)
    assert made.get(C).lease is not None, "nothing is held by what was refused"


def test_weights_and_forms_make_different_digests(made: MadeAdapters) -> None:
    choices = [A, BOTH, AdapterChoice((("a", 2.0), ("b", 0.5))), AdapterChoice((("a", 0.5),))]
    choices += [AdapterChoice(BOTH.parts, "product of sums"), AdapterChoice((("b", 2.0), ("a", 0.5)))]
    digests = set()
    made.adapters.budget = 10_000
    for choice in choices:
        lease = made.get(choice).lease
        assert lease is not None
        digests.add(lease.adapter.digest)
    assert len(digests) == len(choices)


def test_all_are_read_once_when_there_is_time(made: MadeAdapters) -> None:
    made.put(d="not one")
    made.adapters.survey()
    until = time.monotonic() + 20
    while any(not info.digest and not info.error for info in made.adapters.infos()):
        made.adapters.resolve(0.05)
        assert time.monotonic() < until
    infos = {info.name: info for info in made.adapters.infos()}
    assert infos["d"].error == "the file says 'not one'" and made.loaded() == set()
    assert (infos["a"].parent, infos["a"].kind, infos["a"].rank, infos["a"].modules) == ("base", "lora", 1, 1)
    assert sorted(made.reader.read) == ["a", "b", "c", "d"]


def test_choices_are_checked() -> None:
    assert choice_of(None) is None and choice_of("a") == A and choice_of({"a": 0.5, "b": 2}) == BOTH
    assert choices_of("a", 2) == [A, A] and choices_of([None, "a"], 2) == [None, A]
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: choices_of(["a"], 2), "adapter has 1 entries for 2 prompts"),
        (lambda: choice_of(3), "adapter is 3; it must be None, a name"),
        (lambda: choices_of([None, 3], 2), r"adapter\[1\] is 3"),
        (lambda: choice_of({}), "1 to 16 names"),
        (lambda: choice_of({"a": float("nan")}), r"adapter\['a'\] is nan"),
        (lambda: choice_of({"a": True}), r"adapter\['a'\] is True"),
        (lambda: choice_of({"a": 1e9}), "between -10000 and 10000"),
        (lambda: choice_of({str(i): 1.0 for i in range(17)}), "1 to 16 names"),
        (lambda: choice_of(""), "the name of an adapter"),
        (lambda: AdapterChoice((("a", 1.0), ("a", 2.0))), "names that differ"),
        (lambda: AdapterChoice((("a", 1.0),), "product"), "form is 'product'"),  # type: ignore[arg-type]
    ]
    for call, message in wrong:
        with pytest.raises(ParameterError, match=message):
            call()


def test_compositions_that_nobody_uses_are_kept_in_a_bounded_number(made: MadeAdapters) -> None:
    """Any client can make as many as there are weights; one that is in use stays however many others come."""
    held = made.get(BOTH)
    for i in range(3 * KEPT_COMPOSITIONS):
        lease = made.get(AdapterChoice((("a", 1.0), ("b", 1 + i / 100)))).lease
        assert lease is not None
        lease.release()
        del lease
    assert len(made.decoder.made) == 2 + 1 + KEPT_COMPOSITIONS and held.lease is not None
    assert made.adapters.want(BOTH).lease is not None


def test_the_list_is_told_without_looking_at_files_and_changes_are_seen_by_another_thread(made: MadeAdapters) -> None:
    made.adapters.survey()
    until = time.monotonic() + 20
    while any(not info.digest for info in made.adapters.infos()):
        made.adapters.resolve(0.05)
        assert time.monotonic() < until
    look, own = made.adapters.folder.look, threading.current_thread()
    looked: list[threading.Thread] = []

    def seen(name: str) -> object:
        looked.append(threading.current_thread())
        return look(name)

    made.adapters.folder.look = seen  # type: ignore[assignment]
    before = {info.name: info.digest for info in made.adapters.infos()}
    made.put(b="22")
    while {info.name: info.digest for info in made.adapters.infos() if info.digest}.keys() != before.keys() or (
        made.adapters.infos()[1].digest == before["b"]
    ):
        made.adapters.resolve(0.05)
        made.clock.now += LOOK_S
        assert time.monotonic() < until
    assert [info.digest == before[info.name] for info in made.adapters.infos()] == [True, False, True]
    assert len(looked) >= 3 and own not in looked[:3]


def test_folders_whose_names_no_request_could_hold_are_none(made: MadeAdapters) -> None:
    (Path(os.fsdecode(os.fsencode(made.path) + b"/\xff")) / "inside").mkdir(parents=True)
    made.clock.now += LOOK_S
    assert made.adapters.names() == ["a", "b", "c"]
    with pytest.raises(UnknownAdapterError):
        made.adapters.want(AdapterChoice.of("\udcff"))


def test_a_composition_that_does_not_fit_is_refused_for_who_wants_it_and_nobody_else(made: MadeAdapters) -> None:
    """Its first asker has gone while it was made, and one that wants something else waits before the second."""
    product = AdapterChoice(BOTH.parts, "product of sums")
    for choice in (A, B):
        made.get(choice)
    inside, gate = threading.Event(), threading.Event()
    compose = made.adapters.jobs.compose

    def slow(*what: object) -> object:
        inside.set()
        assert gate.wait(20)
        return compose(*what)  # type: ignore[arg-type]

    made.adapters.jobs.compose = slow  # type: ignore[assignment, method-assign]
    gone = made.adapters.want(product)
    other, second = made.adapters.want(C), made.adapters.want(product)
    assert inside.wait(20)
    made.adapters.cancel(gone)
    gate.set()
    made.resolved(second)
    assert isinstance(second.error, BrokenAdapterError) and "more than adapter_bytes, 200" in str(second.error)
    assert other.error is None


def test_one_that_waits_lets_the_engine_rest_once_all_that_went_has_been_given_on(made: MadeAdapters) -> None:
    inside, gate = threading.Event(), threading.Event()
    read = made.adapters.folder._read

    def slow(folder: Path) -> object:
        if folder.name == "c":
            inside.set()
            assert gate.wait(20)
        return read(folder)

    made.adapters.folder._read = slow
    made.adapters.budget = 1000
    both, c = made.adapters.want(BOTH), made.adapters.want(C)
    made.resolved(both)
    assert inside.wait(20) and not c.resolved
    assert not made.adapters.restless, "there is nothing to do until the file has been read"
    gate.set()
    made.resolved(c)
