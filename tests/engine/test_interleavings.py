"""Whatever the interleaving of arrivals, aborts, preemptions, stops and budgets, the engine keeps its promises."""

from __future__ import annotations

from dataclasses import dataclass, field

from fake import EOS, VOCABULARY, FakeRunner, alone, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dsc_serve.engine.engine import Engine
from dsc_serve.sampling_params import SamplingParams


@dataclass
class Sent:
    prompt: list[int]
    max_tokens: int
    stops: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    aborted: bool = False


class Interleavings(RuleBasedStateMachine):
    """Random operations on an engine with a fake runner that reads its logits back from the KV pool."""

    @initialize(blocks=st.integers(4, 14), size=st.integers(1, 5), step=st.integers(4, 20), running=st.integers(1, 4))
    def start(self, blocks: int, size: int, step: int, running: int) -> None:
        self.engine: Engine = fake_engine(blocks, size, step, running, context=32)
        self.sent: dict[str, Sent] = {}

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        room = self.engine.limits.max_tokens
        prompt = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=room))
        max_tokens = data.draw(st.integers(0, room - len(prompt)))
        stops = tuple(data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=2)))
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=stops)
        request_id = str(len(self.sent))
        self.sent[request_id] = Sent(prompt, max_tokens, stops)
        self.engine.add(request_id, prompt, params)

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
                if delta.finish_reason is not None:
                    sent.ends.append(delta.finish_reason)

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert self.engine.scheduler.fault() is None
        assert len(self.engine.scheduler.running) <= self.engine.config.max_running
        runner = self.engine.runner
        assert isinstance(runner, FakeRunner)
        assert max(runner.step_sizes, default=0) <= self.engine.config.step_tokens

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        scheduler = self.engine.scheduler
        assert not scheduler.running and not scheduler.waiting
        assert scheduler.pool.available == scheduler.pool.total
        for sent in self.sent.values():
            want = alone(sent.prompt, sent.max_tokens, (EOS, *sent.stops))
            if sent.aborted:
                assert sent.tokens == want[: len(sent.tokens)]
                assert not sent.ends
            else:
                stopped = bool(want) and want[-1] in (EOS, *sent.stops)
                assert sent.tokens == want
                assert sent.ends == ["stop" if stopped else "length"]


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


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
