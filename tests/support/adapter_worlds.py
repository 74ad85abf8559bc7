"""An engine to whose requests and adapters things happen in any order, and what has been heard of each request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError, UnknownAdapterError
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.request import Request
from dsc_serve.sampling_params import SamplingParams
from support.made_adapters import Clock

DROPPED = "dropped"
END_S = 500


@dataclass
class AdapterRequest:
    """A request, and what has been heard of it."""

    prompt: list[int]
    max_tokens: int
    choice: AdapterChoice | None
    request: Request | None = None  # None before and after
    digest: str = ""  # of the adapter that it has
    tokens: list[int] = field(default_factory=list)
    end: str = ""


class AdapterWorld:
    """Time goes on by two seconds with every event, so that changes of files are seen. shared: begins prompts."""

    def __init__(self, engine: Engine, clock: Clock, shared: list[int]) -> None:
        adapters = engine.arrivals.adapters
        assert adapters is not None
        self.engine, self.adapters, self.clock, self.shared = engine, adapters, clock, shared
        self.asked: dict[str, AdapterRequest] = {}

    def event(self, kind: str, *what: Any) -> None:
        self.clock.now += 2
        getattr(self, kind)(*what)

    def params(self, asked: AdapterRequest) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=asked.max_tokens, ignore_eos=True)

    def ask(self, choice: AdapterChoice | None, shared: int, tail: list[int], max_tokens: int, n: int) -> None:
        """n choices of one prompt; with an adapter that is known not to be there nothing is asked."""
        own = [AdapterRequest(self.shared[:shared] + tail, max_tokens, choice) for _ in range(n)]
        ids, params = [f"{len(self.asked) + i}" for i in range(n)], self.params(own[0])
        try:
            request = self.engine.add(
                ids[0], own[0].prompt, params, adapter=choice, siblings=[(one, params) for one in ids[1:]]
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
                self.asked[one].end = DROPPED

    def load(self) -> None:
        """All that has been asked for, as far as there is room: what happens then hangs on no thread's speed."""
        while self.adapters.loader.busy:
            self.adapters.settle(0.05)

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
                    assert own.digest in ("", own.request.adapter.digest), "a request keeps its adapter"
                    own.digest = own.request.adapter.digest
                if own.end:
                    own.request = None

    def finish(self) -> None:
        """Until all have ended."""
        until = time.monotonic() + END_S
        while not all(own.end for own in self.asked.values()):
            self.clock.now += 0.5
            self.step()
            assert time.monotonic() < until, "a request never ends"

    def check_nothing_is_left(self) -> None:
        """Of blocks, of adapters that nobody may have any more, and of holds on those that anybody may."""
        adapters: Adapters = self.adapters
        self.load()  # what somebody waited for who was dropped
        assert not self.engine.arrivals and not adapters.waiting
        assert self.engine.scheduler.pool.available == self.engine.scheduler.pool.total
        assert adapters.nbytes <= adapters.budget
        assert not adapters._retired, "old versions go with the last that holds them"
        used = {id(part) for entry in adapters._entries.values() for part in entry.parts}
        for entry in adapters._entries.values():
            assert (entry.users > 0) == (id(entry) in used), "only compositions in memory hold anything"
