"""Whatever is loaded, changed, taken away and preempted meanwhile: each request gets what its adapter alone says."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_worlds import DROPPED, AdapterWorld
from support.drafts import guess
from support.fake_runner import VOCABULARY, alone, fake_engine
from support.made_adapters import Clock, PretendedDecoder, Reader, put

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.engine.adapter_folder import AdapterFolder
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.policies import POLICIES

NAMES = "abcd"
KINDS = ("", "x", "y", "t")  # LoRAs, cores on two bases, tenants of a bank; see `Reader`
TEXTS = ("1", "2", "34", "x1", "x2", "y1", "t1", "t2", "broken")
SHARED = [(7 * i) % VOCABULARY for i in range(12)]


class MadeWorld(AdapterWorld):
    """Over a folder that changes, of adapters of no real model, which take 100 bytes each and their bases 50."""

    def __init__(self, folder: Path, budget: int, **options: Any) -> None:
        self.folder, self.decoder, clock = folder, PretendedDecoder(), Clock()
        adapters = Adapters(AdapterFolder(folder, Reader(), clock), self.decoder, 100 * budget, clock=clock)
        super().__init__(fake_engine(adapters=adapters, **options), clock, SHARED)

    def write(self, name: str, text: str) -> None:
        put(self.folder, name, text)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def check(self) -> None:
        for own in self.asked.values():
            if own.end == "length":
                assert own.tokens == alone(own.prompt, own.max_tokens, (), own.digest)
            elif own.end == DROPPED:
                assert own.tokens == alone(own.prompt, own.max_tokens, (), own.digest)[: len(own.tokens)]
            else:
                assert "cannot be used" in own.end or "is not known" in own.end
        self.check_nothing_is_left()
        gc.collect()
        held = {id(basis) for entry in self.adapters.held for basis in entry.loaded.weights.bases}
        assert {id(basis) for basis in self.decoder.bases} == held, "a basis goes with the last that stands on it"


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
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.sampled_from(TEXTS)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("drop"), st.integers(0, 20)),
)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
    events=st.lists(EVENTS, min_size=1, max_size=25),
    budget=st.integers(2, 4),
    blocks=st.integers(14, 40),
    policy=st.sampled_from(sorted(POLICIES)),
    drafts=st.booleans(),
)
def test_each_gets_what_its_adapter_says(
    kinds: tuple[str, ...], events: list[tuple[Any, ...]], budget: int, blocks: int, policy: str, drafts: bool
) -> None:
    with TemporaryDirectory() as path:
        for i, (name, kind) in enumerate(zip(NAMES, kinds, strict=False)):
            put(Path(path), name, f"{kind}{i + 5}")
        world = MadeWorld(Path(path), budget, blocks=blocks, policy=policy, max_running=4)
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
@pytest.mark.parametrize("kinds", [("",), KINDS], ids=["of one kind", "of all kinds"])
def test_many_more_adapters_than_fit(
    tmp_path: Path, policy: str, count: int, budget: int, kinds: tuple[str, ...]
) -> None:
    """Each is had once by somebody, some always: nobody starves, and what has gone is gone."""
    for i in range(count):
        put(tmp_path, f"t{i}", f"{kinds[i % len(kinds)]}{i + 1}")
    world = MadeWorld(tmp_path, budget, blocks=400, max_running=32, step_tokens=64, policy=policy, prefix_cache=False)
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


def test_compositions_of_kinds_that_do_not_compose_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    """Two tenants of a bank in a sum; a core, and a tenant, in a product of sums. Others beside them go on."""
    for name, text in zip(NAMES, ("1", "x2", "t3", "t4"), strict=True):
        put(tmp_path, name, text)
    world = MadeWorld(tmp_path, 8, blocks=60)
    said = {}
    for names, form in (("cd", "sum"), ("ab", "product of sums"), ("ac", "product of sums"), ("abc", "sum")):
        said[names, form] = str(len(world.asked))
        world.ask(AdapterChoice(tuple((name, 0.5) for name in names), form), 4, [1, 2], 6, 1)  # type: ignore[arg-type]
        world.ask(AdapterChoice.of("b"), 4, [3], 6, 1)
    world.finish()
    ends = {key: world.asked[one].end for key, one in said.items()}
    assert "c and d are tenants of a bank; a composition may have one" in ends["cd", "sum"]
    assert "its matrices are a basis's, which others have too" in ends["ab", "product of sums"]
    assert "c is a tenant of a bank and has no matrices" in ends["ac", "product of sums"]
    assert ends["abc", "sum"] == "length"
    world.check()
    world.engine.close()
