"""Whatever the interleaving of arrivals, aborts, preemptions, stops and deadlines, under every policy and budget, the
engine keeps its promises."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.drafts import guess
from support.fake_runner import EOS, VOCABULARY, FakeRunner, alone, fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.policies import POLICIES
from dsc_serve.engine.step_time import Estimate
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

OVERTAKEN, OVERTAKE_S = 3, 5.0
SHARED = [[(7 * i + j) % VOCABULARY for j in range(30)] for i in range(2)]
SLOW = Estimate(step=1.0, single=4.0, token=1.5, pair=0.1)
TERMS = st.builds(
    SchedulingParams,
    tenant=st.sampled_from("abc"),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    priority=st.integers(-1, 1),
    queue_timeout_s=st.sampled_from([None, None, 3.0]),
    timeout_s=st.sampled_from([None, None, None, 12.0]),
    cache_salt=st.sampled_from(["", "", "salt"]),
)


@dataclass
class Sent:
    prompt: list[int]
    max_tokens: int
    stops: tuple[int, ...]
    scheduling: SchedulingParams
    tokens: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    aborted: bool = False
    overtaken: int = 0


class Interleavings(RuleBasedStateMachine):
    """Random operations on an engine with a fake runner that reads its logits back from the KV pool."""

    ahead = False  # whether steps are launched before the last one's tokens have been read

    @initialize(
        blocks=st.integers(4, 14),
        size=st.integers(1, 5),
        step=st.integers(4, 20),
        running=st.integers(1, 4),
        policy=st.sampled_from(sorted(POLICIES)),
        prefix_cache=st.booleans(),
        estimate=st.sampled_from([None, SLOW]),
        drafts=st.sampled_from([0, 0, 1, 4]),
        right=st.sampled_from([0.0, 0.6, 1.0]),
        windows=st.sampled_from([(0,), (0,), (3,), (7,), (0, 4), (0, 0, 6), (2, 5, 5)]),
    )
    def start(
        self,
        blocks: int,
        size: int,
        step: int,
        running: int,
        policy: str,
        prefix_cache: bool,
        estimate: Estimate | None,
        drafts: int,
        right: float,
        windows: tuple[int, ...],
    ) -> None:
        caching, blocks = {"prefix_cache": prefix_cache, "windows": windows}, blocks * len(windows)
        self.engine: Engine = fake_engine(
            blocks, size, step, running, context=32, policy=policy, estimate=estimate, ahead=self.ahead, **caching
        )
        if drafts:
            guess(self.engine, drafts, right, blocks)
        self.scheduler = self.engine.scheduler
        self.scheduler.budget = replace(self.scheduler.budget, overtaken=OVERTAKEN, overtake_s=OVERTAKE_S)
        self.now = 0.0
        self.scheduler.clock = lambda: self.now
        self.sent: dict[str, Sent] = {}

    @rule(data=st.data(), shared=st.integers(0, 30), which=st.sampled_from(SHARED), scheduling=TERMS)
    def arrive(self, data: st.DataObject, shared: int, which: list[int], scheduling: SchedulingParams) -> None:
        room = self.engine.capacity.max_tokens
        beginning = which[: min(shared, room - 1)]
        tail = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=room - len(beginning))
        prompt = beginning + data.draw(tail)
        max_tokens = data.draw(st.integers(0, room - len(prompt)))
        stops = tuple(data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=2)))
        asks = data.draw(st.sampled_from([None, None, None, 0]))
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=stops, prompt_logprobs=asks)
        choices = data.draw(st.sampled_from([1, 1, 1, 2, 3, 6]))
        request_id, *others = ids = [str(len(self.sent) + i) for i in range(choices)]
        self.sent |= {one: Sent(prompt, max_tokens, stops, scheduling) for one in ids}
        siblings = [(one, params) for one in others]
        request = self.engine.add(request_id, prompt, params, scheduling=scheduling, siblings=siblings)
        signature = data.draw(st.sampled_from([None, 0b11, 0b1100]))
        request.signature = None if signature is None else np.array([signature], dtype=np.uint64)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if not self.sent:
            return
        request_id = data.draw(st.sampled_from(sorted(self.sent)))
        ended = bool(self.sent[request_id].ends) or self.sent[request_id].aborted
        assert self.engine.finish(request_id) is not ended
        assert self.engine.finish(request_id) is False
        self.sent[request_id].aborted |= not ended

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            if not self.engine.has_work:
                return
            for delta in self.engine.step():
                sent = self.sent[delta.request_id]
                assert not sent.aborted and not sent.ends, "news of a request that has ended"
                sent.tokens += delta.token_ids
                assert delta.cached_tokens < len(sent.prompt), "the last prompt token is computed in any case"
                if delta.finish_reason is not None:
                    sent.ends.append(delta.finish_reason)
            self.overtaking_is_bounded()
            self.now += 1.0

    def overtaking_is_bounded(self) -> None:
        for request in self.scheduler.waiting.requests():
            sent = self.sent[request.id]
            if request.overtaken > sent.overtaken:
                assert self.now - request.overtaken_at < OVERTAKE_S
                assert request.overtaken <= OVERTAKEN
            sent.overtaken = request.overtaken

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert self.scheduler.fault() is None
        pool, requests = self.scheduler.pool, self.scheduler.running.values()
        owned = {block for request in requests for block in request.blocks}
        assert sorted([*pool._free, *pool._cached, *owned]) == list(range(pool.total))
        live = [self.scheduler.get(request_id) for request_id in self.sent]
        shared = any(request is not None and request.shared is not None for request in live)
        assert pool.cached == 0 or self.engine.config.prefix_cache or shared
        assert len(self.scheduler.running) <= self.engine.config.max_running
        runner = self.engine.runner
        assert isinstance(runner, FakeRunner)
        assert max(runner.step_sizes, default=0) <= self.engine.config.step_tokens

    @invariant()
    def published_blocks_hold_what_their_names_say(self) -> None:
        if not hasattr(self, "engine"):
            return
        pool, runner = self.scheduler.pool, self.engine.runner
        assert isinstance(runner, FakeRunner)
        size, groups = self.scheduler.block_size, range(pool.groups)
        for request in self.scheduler.running.values():
            for i, name in enumerate(request.block_hashes):
                for block in filter(lambda found: found is not None, [pool.find(name, group) for group in groups]):
                    assert runner.pool[block] == request.tokens[i * size : (i + 1) * size]

    @invariant()
    def what_lies_behind_a_window_is_given_back(self) -> None:
        if not hasattr(self, "engine"):
            return
        layout, drafted = self.scheduler.layout, self.engine.drafter.most
        for request in self.scheduler.running.values():
            for group, window in enumerate(layout.windows):
                held = request.pages - request.gone[group]
                computed = request.num_computed if request.landed is None else request.landed[0]
                in_flight, behind = request.num_computed - computed, layout.behind(group, computed)
                assert request.gone[group] == behind or (request.gone[group] < behind and in_flight)
                assert not window or held <= layout.most_pages(group, 10**6, 1 + drafted + in_flight)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        scheduler = self.scheduler
        assert not scheduler.running and not scheduler.waiting and not scheduler.families
        assert scheduler.pool.available == scheduler.pool.total
        self.nothing_is_left_behind()
        for sent in self.sent.values():
            want = alone(sent.prompt, sent.max_tokens, (EOS, *sent.stops))
            if sent.aborted or sent.ends == ["timeout"]:
                assert sent.tokens == want[: len(sent.tokens)]
                assert sent.aborted != bool(sent.ends)
            else:
                stopped = bool(want) and want[-1] in (EOS, *sent.stops)
                assert sent.tokens == want
                assert sent.ends == ["stop" if stopped else "length"]

    def nothing_is_left_behind(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler._deadlines) == 0
        maps = [*vars(scheduler.waiting).values(), *vars(scheduler.accounts).values()]
        assert not any(len(found) for found in maps if isinstance(found, dict | list))


class InterleavingsAhead(Interleavings):
    """The same where the tokens of a step are read when the next one has been launched."""

    ahead = True


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestInterleavingsAhead = InterleavingsAhead.TestCase
TestInterleavingsAhead.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
    seeds=st.integers(0, 2**32),
    tight=st.integers(8, 40),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
)
def test_sampled_tokens_do_not_depend_on_company(
    sizes: list[tuple[int, int]], seeds: int, tight: int, temperature: float
) -> None:
    """A request's tokens are its own seed's, in a tight pool with preemptions or in one by itself."""
    crowd = fake_engine(blocks=tight, block_size=5, step_tokens=16, max_running=6, context=40)
    params = [
        SamplingParams(temperature=temperature, seed=seeds + i, max_tokens=n, top_p=0.9, ignore_eos=True)
        for i, (_, n) in enumerate(sizes)
    ]
    prompts = [[(i * 7 + j) % VOCABULARY for j in range(length)] for i, (length, _) in enumerate(sizes)]
    together: dict[str, list[int]] = {str(i): [] for i in range(len(sizes))}
    for i, prompt in enumerate(prompts):
        crowd.add(str(i), prompt, params[i])
    while crowd.has_work:
        for delta in crowd.step():
            together[delta.request_id] += delta.token_ids
    for i, prompt in enumerate(prompts):
        single = fake_engine(blocks=8, block_size=5, step_tokens=40, context=40)
        single.add("x", prompt, params[i])
        tokens: list[int] = []
        while single.has_work:
            for delta in single.step():
                tokens += delta.token_ids
        assert together[str(i)] == tokens
