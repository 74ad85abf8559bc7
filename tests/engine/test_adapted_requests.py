"""Requests with adapters in an engine: they wait for them, keep them, and share with whom they may."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.drafts import guess
from support.fake_runner import alone, fake_engine
from support.made_adapters import MadeAdapters

from dsc_serve.adapter_choice import AdapterChoice, UnknownAdapterError
from dsc_serve.engine.adapter_folder import LOOK_S
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.kv_cache import hash_seed
from dsc_serve.engine.output import Delta
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
A, B, C = (AdapterChoice.of(name) for name in "abc")
BOTH = AdapterChoice((("a", 0.5), ("b", 2.0)))


@pytest.fixture
def made(tmp_path: Path) -> MadeAdapters:
    own = MadeAdapters(tmp_path)
    own.put(a="1", b="2", c="3")
    return own


def run(engine: Engine, *ids: str) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Tokens and ends of requests, once all of them have ended."""
    tokens: dict[str, list[int]] = {one: [] for one in ids}
    ends: dict[str, str] = {}
    until = time.monotonic() + 30
    while ends.keys() != tokens.keys():
        if not engine.has_work:
            engine.arrivals.wait()
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                ends[delta.request_id] = delta.error or delta.finish_reason
        assert time.monotonic() < until
    return tokens, ends


def first_news(engine: Engine) -> Delta:
    """The first news that there is."""
    until = time.monotonic() + 20
    while True:
        engine.arrivals.wait()
        for delta in engine.step():
            return delta
        assert time.monotonic() < until


def digest(made: MadeAdapters, choice: AdapterChoice) -> str:
    wanted = made.get(choice)
    assert wanted.lease is not None
    wanted.lease.release()
    return wanted.lease.adapter.digest


def test_requests_wait_for_their_adapters_while_others_go_on(made: MadeAdapters) -> None:
    engine = fake_engine(adapters=made.adapters)
    engine.add("base", [1, 2, 3], GREEDY)
    engine.add("a", [1, 2, 3], GREEDY, adapter=A)
    assert len(engine.arrivals) == 1
    first = {delta.request_id: delta.token_ids for delta in engine.step()}
    assert "base" in first, "it does not wait for another's adapter"
    tokens, ends = run(engine, "base", "a")
    assert first["base"] + tokens["base"] == alone([1, 2, 3], 4, ())
    assert first.get("a", []) + tokens["a"] == alone([1, 2, 3], 4, (), digest(made, A)) != alone([1, 2, 3], 4, ())
    assert ends == {"base": "length", "a": "length"}
    assert engine.adapter_report.requests == {"a": 1} and engine.adapter_report.tokens == {"a": 6}


def test_prefixes_are_shared_only_with_the_same_content(made: MadeAdapters) -> None:
    """Not by name, not with the base, not with a salt that spells the digest; again once it is loaded anew."""
    engine, prompt = fake_engine(blocks=60, adapters=made.adapters), [5] * 9

    def cached(choice: AdapterChoice | None, salt: str = "") -> int:
        engine.add("x", prompt, GREEDY, adapter=choice, scheduling=SchedulingParams(cache_salt=salt))
        before = engine.scheduler.cached_tokens
        run(engine, "x")
        return engine.scheduler.cached_tokens - before

    content = digest(made, A)
    assert [cached(None), cached(A), cached(A), cached(B), cached(None)] == [0, 0, 8, 0, 8]
    assert cached(None, content) == 0 == cached(A, content)
    made.put(b="1", a="12")  # a's content under another name, and other content under a's
    assert cached(B) == 8
    assert cached(A) == 0
    assert cached(BOTH) == 0 and cached(BOTH) == 8
    made.put(a="1")
    assert cached(A) == 8, "the content that there was before is the same again"
    assert hash_seed(b"k", "ab", "c") != hash_seed(b"k", "a", "bc") != hash_seed(b"k", "abc")


def test_choices_of_one_prompt_share_the_adapter_and_each_lets_go_of_it(made: MadeAdapters) -> None:
    engine = fake_engine(blocks=60, adapters=made.adapters)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine.add("0", [1] * 6, params, adapter=A, siblings=[("1", params), ("2", params)])
    assert engine.finish("0") and not engine.finish("0")
    tokens, _ = run(engine, "1", "2")
    assert tokens["1"] == tokens["2"] == alone([1] * 6, 3, (), digest(made, A))
    assert all(not entry.users for entry in made.adapters._entries.values())


def test_what_fails_ends_with_the_reason_and_what_is_out_of_time_ends(made: MadeAdapters) -> None:
    made.put(a="nonsense")
    engine = fake_engine(adapters=made.adapters)
    engine.scheduler.clock = made.clock
    engine.add("broken", [1], GREEDY, adapter=A, siblings=[("too", GREEDY)])
    _, ends = run(engine, "broken", "too")
    assert set(ends.values()) == {"adapter 'a' cannot be used: the file says 'nonsense'"}
    with pytest.raises(UnknownAdapterError):
        engine.add("z", [1], GREEDY, adapter=AdapterChoice.of("z"))
    held = [made.get(B), made.get(C)]
    made.put(a="1")
    engine.add("late", [1], GREEDY, adapter=A, scheduling=SchedulingParams(queue_timeout_s=5))
    made.clock.now += 6
    assert engine.has_work
    _, ends = run(engine, "late")
    assert ends == {"late": "the request did not begin within its queue_timeout_s of 5 s"}
    assert not engine.arrivals and len(held) == 2
    with pytest.raises(UnknownAdapterError, match="there are none: set adapters to their folder"):
        fake_engine().add("a", [1], GREEDY, adapter=A)


def test_what_becomes_of_drafts_is_kept_apart_for_each_adapter(made: MadeAdapters) -> None:
    """The source knows how the base goes on, and is wrong of whoever has an adapter."""
    engine = fake_engine(blocks=60, adapters=made.adapters)
    guess(engine, 3, 1.0, 0)
    content = digest(made, A)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for i in range(3):
        engine.add(f"base {i}", [1, i], params)
        engine.add(f"a {i}", [1, i], params, adapter=A)
    run(engine, *engine.scheduler.waiting)
    seen = {name: own["greedy", 0].chance for name, own in engine.drafter._seen.items()}
    assert seen.keys() == {"", content} and seen[""] > 0.9 and seen[content] < 0.3


def test_affinity_prefers_what_runs_already(made: MadeAdapters) -> None:
    made.adapters.budget = 10_000
    engine = fake_engine(blocks=60, max_running=2, policy="affinity", adapters=made.adapters)
    for choice in (A, B):
        digest(made, choice)
    long = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add("first", [1], long, adapter=A)
    engine.step()
    engine.add("b", [2], GREEDY, adapter=B)
    engine.add("a", [3], GREEDY, adapter=A)
    engine.step()
    assert set(engine.scheduler.running) == {"first", "a"}
    run(engine, "first", "b", "a")


def test_no_step_is_made_for_those_who_wait_alone(made: MadeAdapters) -> None:
    held = [made.get(B), made.get(C)]
    engine = fake_engine(adapters=made.adapters)
    engine.add("a", [1], GREEDY, adapter=A)
    for i in range(5):
        engine.arrivals.wait()
        engine.add(f"another {i}", [1], GREEDY, adapter=A)
        assert engine.finish(f"another {i}") and engine.has_work  # something has been let go of
        assert engine.step() == []
    assert engine.counters.steps == 0 and not engine.runner.step_sizes and len(held) == 2


def test_one_that_waits_says_how_long_it_may(made: MadeAdapters) -> None:
    held = [made.get(B), made.get(C)]
    engine = fake_engine(adapters=made.adapters)
    arrivals = engine.arrivals
    engine.scheduler.clock = made.clock
    assert arrivals.patience_s is None
    engine.add("no limit", [1], GREEDY, adapter=A)
    assert arrivals.patience_s is None
    engine.add("late", [1], GREEDY, adapter=A, scheduling=SchedulingParams(queue_timeout_s=5, timeout_s=3), age_s=1)
    assert arrivals.patience_s == 2
    made.clock.now += 9
    assert arrivals.patience_s == 0
    (delta,) = engine.step()
    assert (delta.request_id, delta.finish_reason) == ("late", "timeout")
    assert engine.scheduler.timeouts == 1 and arrivals.patience_s is None and len(held) == 2


def test_who_is_refused_hears_of_no_other_adapter_and_whose_fault_it_is(
    made: MadeAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, read = fake_engine(adapters=made.adapters), made.adapters.folder._read

    def removed_meanwhile(folder: Path) -> object:
        (folder / "file").unlink()
        folder.rmdir()
        made.clock.now += LOOK_S
        return read(folder)

    with monkeypatch.context() as patch:
        patch.setattr(made.adapters.folder, "_read", removed_meanwhile)
        engine.add("gone", [1], GREEDY, adapter=A)
        told = first_news(engine)
    assert (told.error, told.error_field, told.unknown) == ("adapter 'a' is not known", "adapter", True)
    assert not told.unavailable

    def fails(*parts: object, **others: object) -> object:
        raise MemoryError("no room")

    monkeypatch.setattr(made.decoder, "adapter", fails)
    made.put(d="4")
    engine.add("accident", [1], GREEDY, adapter=AdapterChoice.of("d"))
    told = first_news(engine)
    assert "could not be loaded: MemoryError: no room" in told.error
    assert told.unavailable and not told.error_field and not told.unknown
