"""Adapters of every kind in one engine of a real model: each request gets what a model of its adapter's own says."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_worlds import DROPPED, AdapterRequest, AdapterWorld
from support.drafts import any_width, draft_from
from support.made_adapters import Clock
from support.mixed_kinds import CHOICES, NAMES, VOCABULARY, MixedKinds
from support.whole_steps import decoder

from dsc_kernels import ops
from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.bench.step.known_drafts import known_kinds
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.leases import bytes_of
from dsc_serve.engine.policies import POLICIES
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams

MOVES = "moves"  # an adapter whose folder becomes one of NAMES's, of whatever kind, and another one later
SHARED = [(11 * i + 3) % VOCABULARY for i in range(24)]
MOST = 14  # tokens of an answer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MixedKinds:
    return MixedKinds(tmp_path_factory.mktemp("kinds"))


def largest(made: MixedKinds, model: Decoder) -> int:
    """Bytes of the choice that takes most, its parts and their bases among them."""
    config = EngineConfig(model=str(made.model), dtype="float32", threads=1, adapters=str(made.adapters), kv_tokens=64)
    engine = Engine.for_model(model, config)
    adapters = engine.arrivals.adapters
    assert adapters is not None
    engine.arrivals.check(CHOICES.values(), engine.step)
    entries = list(adapters.held)
    assert len(entries) == len(CHOICES) - 1, "all but the base"
    engine.close()
    return max(bytes_of((entry, *entry.parts)) for entry in entries)


class ModelWorld(AdapterWorld):
    """Of a real engine. rate: of drafts that are right; None: nothing is drafted. Of choices `moves` is one more."""

    def __init__(
        self, made: MixedKinds, folder: Path, rate: float | None, seed: int, model: Decoder, **options: Any
    ) -> None:
        self.made, self.folder, self.rate, clock = made, folder, rate, Clock()
        for own in made.adapters.iterdir():
            (folder / own.name).symlink_to(own)
        self.move("lora")
        config = EngineConfig(model=str(made.model), dtype="float32", threads=1, adapters=str(folder), **options)
        engine = Engine.for_model(model, config, strict=True)
        adapters = engine.arrivals.adapters
        assert adapters is not None
        adapters.clock = adapters.folder._clock = clock
        if rate is not None:
            draft_from(engine, 3, known_kinds(rate, VOCABULARY), any_width(seed))
        super().__init__(engine, clock, SHARED)

    def move(self, name: str) -> None:
        """The adapter that moves becomes another."""
        shutil.rmtree(self.folder / MOVES, ignore_errors=True)
        shutil.copytree(self.made.adapters / name, self.folder / MOVES)
        self.is_now = name

    def params(self, asked: AdapterRequest) -> SamplingParams:
        """With the answer for drafts to know, where they do."""
        choice = self.real(asked.choice)
        known = () if self.rate is None else self.made.answer(choice, tuple(asked.prompt), asked.max_tokens)
        return msgspec.structs.replace(super().params(asked), prediction_token_ids=known)

    def real(self, choice: AdapterChoice | None) -> AdapterChoice | None:
        return AdapterChoice.of(self.is_now) if choice == AdapterChoice.of(MOVES) else choice

    def check(self) -> None:
        for own in self.asked.values():
            choice = own.choice
            if own.digest and choice is not None and choice.single:
                choice = AdapterChoice.of(self.made.digests[own.digest])
                assert own.choice in (choice, AdapterChoice.of(MOVES)), "it has the adapter that it asked for"
            assert own.end in ("length", DROPPED), own.end
            assert len(own.tokens) == own.max_tokens or own.end == DROPPED
            assert bool(own.digest) == (choice is not None) or own.end == DROPPED
            assert self.made.says(choice, own.prompt, own.tokens)
        self.check_nothing_is_left()


ASKED = st.tuples(
    st.just("ask"),
    st.sampled_from([*CHOICES.values(), AdapterChoice.of(MOVES), AdapterChoice.of(MOVES)]),
    st.sampled_from([0, 5, 12, 24]),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3),
    st.integers(1, MOST),
    st.integers(1, 2),
)
EVENTS = st.one_of(
    ASKED,
    ASKED,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("drop"), st.integers(0, 20)),
    st.tuples(st.just("move"), st.sampled_from(NAMES)),
)


Run = Callable[..., ModelWorld]


@pytest.fixture(scope="module")
def run(made: MixedKinds) -> Run:
    """Let events happen in a world of its own, to their end; it is checked, and told of.

    room: bytes for adapters, as a multiple of those of the largest choice.
    """
    sizes: dict[Decoder, int] = {}

    def run(events: list[tuple[Any, ...]], room: float, model: Decoder | None = None, **options: Any) -> ModelWorld:
        model = model or made.decoder
        if model not in sizes:
            sizes[model] = largest(made, model)
        with TemporaryDirectory() as folder:
            size = int(room * sizes[model])
            world = ModelWorld(made, Path(folder), model=model, adapter_bytes=size, **options)
            for event in events:
                world.event(*event)
            world.finish()
            world.check()
            world.engine.close()
        return world

    return run


@settings(max_examples=100, deadline=None)
@given(
    events=st.lists(EVENTS, min_size=2, max_size=20),
    room=st.sampled_from([1.0, 1.5, 5.0]),
    blocks=st.integers(12, 50),
    step_tokens=st.sampled_from([6, 16, 64]),
    policy=st.sampled_from(sorted(POLICIES)),
    prefix_cache=st.booleans(),
    rate=st.sampled_from([None, 0.6, 1.0]),
    seed=st.integers(0, 9),
)
def test_each_gets_what_its_adapters_own_model_says(
    run: Run,
    events: list[tuple[Any, ...]],
    room: float,
    blocks: int,
    step_tokens: int,
    policy: str,
    prefix_cache: bool,
    rate: float | None,
    seed: int,
) -> None:
    """Whoever is beside it, comes, goes and is preempted; whatever is drafted, found in the cache or loaded again."""
    run(
        events,
        room,
        rate=rate,
        seed=seed,
        block_size=4,
        kv_tokens=4 * blocks,
        step_tokens=step_tokens,
        max_running=6,
        policy=policy,
        prefix_cache=prefix_cache,
    )


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_what_this_is_about_does_happen(made: MixedKinds, kernels: str, run: Run) -> None:
    """All kinds in one step, preemption, prefixes that are found, drafts, adapters that go and one that changes."""
    ops.use(kernels)
    rng, events = random.Random(3), list[tuple[Any, ...]]()
    for _ in range(3):
        for choice in rng.sample([*CHOICES.values(), AdapterChoice.of(MOVES)], len(CHOICES) + 1):
            events.append(("ask", choice, rng.choice([5, 12]), [rng.randrange(VOCABULARY)], MOST, rng.choice([1, 2])))
        events += [("load",), ("step", 8), ("drop", rng.randrange(50)), ("move", rng.choice(NAMES))]
    size = {"block_size": 4, "kv_tokens": 120, "step_tokens": 64, "max_running": 16, "policy": "fcfs"}
    world = run(events, 1.2, decoder(made.config, made.tensors), rate=0.8, seed=1, **size)
    engine, report = world.engine, world.engine.adapter_report
    assert engine.scheduler.preemptions > 0 and engine.scheduler.cached_tokens > 0
    assert sum(engine.drafter.report.accepted.values()) > 20
    assert world.adapters.counts.evictions > 0 and world.adapters.counts.errors == 0
    assert max(i for i, count in enumerate(report.distinct.counts) if count) >= 3, "of several in one step"
    had = {world.made.digests.get(own.digest) for own in world.asked.values()}
    assert had >= set(NAMES) and None in had, "each by itself, the base and compositions"
    assert made.apart and len(made.apart) == 12, "an adapter stands on its basis in part"


def test_no_two_choices_say_the_same(made: MixedKinds) -> None:
    """Else it would not be seen whose adapter a token was computed with."""
    for prompt in (SHARED[:12], SHARED[:24]):
        answers = {name: list(made.answer(choice, tuple(prompt), 8)) for name, choice in CHOICES.items()}
        for name, choice in CHOICES.items():
            said = [other for other, answer in answers.items() if made.says(choice, prompt, answer)]
            assert said == [name]
