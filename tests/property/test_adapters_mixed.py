"""Whatever is loaded, changed, taken away and preempted meanwhile: each request gets what its adapter alone says."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drafts import guess
from support.fake_runner import VOCABULARY, alone, fake_engine
from support.made_adapters import PretendedDecoder, Reader, put

from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError, UnknownAdapterError
from dsc_serve.engine.adapter_folder import AdapterFolder
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.policies import POLICIES
from dsc_serve.engine.request import Request
from dsc_serve.sampling_params import SamplingParams

NAMES = "abcd"
SHARED = [(7 * i) % VOCABULARY for i in range(12)]


@dataclass
class Asked:
    """A request, and what has been heard of it. request: None where it was refused."""

    prompt: list[int]
    max_tokens: int
    request: Request | None = None
    digest: str | None = None
    tokens: list[int] = field(default_factory=list)
    end: str = ""


class World:
    """An engine over a folder that changes; time goes on by two seconds with every event, so that changes are seen."""

    def __init__(self, folder: Path, budget: int, **options: Any) -> None:
        self.folder, self.now, self.decoder = folder, 0.0, PretendedDecoder()
        clock = lambda: self.now  # noqa: E731
        self.adapters = Adapters(AdapterFolder(folder, Reader(), clock), self.decoder, 100 * budget, clock=clock)
        self.engine: Engine = fake_engine(adapters=self.adapters, **options)
        self.asked: dict[str, Asked] = {}

    def event(self, kind: str, *what: Any) -> None:
        self.now += 2
        getattr(self, kind)(*what)

    def write(self, name: str, text: str) -> None:
        put(self.folder, name, text)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def ask(self, choice: AdapterChoice | None, shared: int, tail: list[int], max_tokens: int, n: int) -> None:
        prompt, params = SHARED[:shared] + tail, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        ids = [f"{len(self.asked) + i}" for i in range(n)]
        own = [Asked(prompt, max_tokens) for _ in ids]
        try:
            request = self.engine.add(
                ids[0], prompt, params, adapter=choice, siblings=[(one, params) for one in ids[1:]]
            )
        except (UnknownAdapterError, BrokenAdapterError):
            return
        found = [request, *[self.engine._get(one) for one in ids[1:]]]
        for one_id, one, asked in zip(ids, found, own, strict=True):
            asked.request = one
            self.asked[one_id] = asked

    def drop(self, number: int) -> None:
        if self.asked:
            one = list(self.asked)[number % len(self.asked)]
            if self.engine.finish(one):
                self.asked[one].end = "dropped"

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            if not self.engine.has_work:
                self.engine.arrivals.wait()
            for delta in self.engine.step():
                own = self.asked[delta.request_id]
                assert not own.end, "nothing comes after the end"
                own.tokens += delta.token_ids
                if delta.finish_reason is not None:
                    own.end = delta.error or delta.finish_reason
            for own in self.asked.values():
                if own.request is not None and own.request.adapter is not None:
                    assert own.digest in (None, own.request.adapter.digest), "a request keeps its adapter"
                    own.digest = own.request.adapter.digest
                if own.end:
                    own.request = None

    def finish(self) -> None:
        until = time.monotonic() + 500
        while not all(own.end for own in self.asked.values()):
            self.now += 0.5
            self.step()
            assert time.monotonic() < until, "a request never ends"

    def check(self) -> None:
        for own in self.asked.values():
            if own.end == "length":
                assert own.tokens == alone(own.prompt, own.max_tokens, (), own.digest or "")
            elif own.end == "dropped":
                assert own.tokens == alone(own.prompt, own.max_tokens, (), own.digest or "")[: len(own.tokens)]
            else:
                assert "cannot be used" in own.end or "is not known" in own.end
        assert not self.engine.arrivals and not self.adapters.waiting
        assert self.engine.scheduler.pool.available == self.engine.scheduler.pool.total
        assert self.adapters.nbytes <= self.adapters.budget
        assert not self.adapters._retired, "old versions go with the last that holds them"
        used = {id(part) for entry in self.adapters._entries.values() for part in entry.parts}
        for entry in self.adapters._entries.values():
            assert (entry.users > 0) == (id(entry) in used), "only compositions in memory hold anything"


CHOICES = st.one_of(
    st.none(),
    st.sampled_from(NAMES).map(AdapterChoice.of),
    st.builds(
        lambda names, weights, form: AdapterChoice(tuple(zip(names, weights, strict=False)), form),
        st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True),
        st.tuples(st.sampled_from([0.5, 1.0]), st.sampled_from([-1.0, 2.0])),
        st.sampled_from(["sum", "product of sums"]),
    ),
)
EVENTS = st.one_of(
    st.tuples(
        st.just("ask"),
        CHOICES,
        st.integers(0, 12),
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
        st.integers(1, 12),
        st.integers(1, 3),
    ),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.sampled_from(["1", "2", "34", "broken"])),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("drop"), st.integers(0, 20)),
)


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(EVENTS, min_size=1, max_size=25),
    budget=st.integers(2, 4),
    blocks=st.integers(14, 40),
    policy=st.sampled_from(sorted(POLICIES)),
    drafts=st.booleans(),
)
def test_each_gets_what_its_adapter_says(
    events: list[tuple[Any, ...]], budget: int, blocks: int, policy: str, drafts: bool
) -> None:
    with TemporaryDirectory() as path:
        for i, name in enumerate(NAMES[:3]):
            put(Path(path), name, str(i + 5))
        world = World(Path(path), budget, blocks=blocks, policy=policy, max_running=4)
        if drafts:
            guess(world.engine, 3, 0.7, 1)
        for event in events:
            world.event(*event)
        world.finish()
        world.check()
        world.engine.close()


@pytest.mark.parametrize(
    ("policy", "count", "budget"),
    [("affinity", 120, 6), ("fair", 120, 6), pytest.param("fcfs", 1000, 50, marks=pytest.mark.full)],
)
def test_many_more_adapters_than_fit(tmp_path: Path, policy: str, count: int, budget: int) -> None:
    """Each is had once by somebody, some always: nobody starves, and what has gone is gone."""
    for i in range(count):
        put(tmp_path, f"t{i}", str(i + 1))
    world = World(tmp_path, budget, blocks=400, max_running=32, step_tokens=64, policy=policy, prefix_cache=False)
    loyal = AdapterChoice.of("t0")
    for i in range(count):
        world.ask(AdapterChoice.of(f"t{i}"), 0, [i % VOCABULARY, 3], 2, 1)
        if i % 10 == 0:
            world.ask(loyal, 0, [4, i % VOCABULARY], 3, 1)
        if i % 4 == 0:
            world.step()
        assert world.adapters.nbytes <= 100 * budget and len(world.decoder.made) <= budget + 2
    world.finish()
    world.check()
    assert all(own.end == "length" for own in world.asked.values()) and len(world.asked) == count + count // 10
    assert world.adapters.counts.loads >= count and world.adapters.in_memory <= budget
    assert len(world.decoder.made) <= budget
    assert world.engine.adapter_report.requests["t0"] == 1 + count // 10
    world.engine.close()
