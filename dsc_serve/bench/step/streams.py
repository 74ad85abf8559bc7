"""Streams that decode in engines of this process, whose steps are timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import SamplingParams

WARM_STEPS = 8


class Streams:
    """An engine in which so many streams decode, for at least so many steps after they have been begun.

    Prompts are of different random-like tokens; there is room for what begins beside what ends.
    """

    def __init__(self, model: Decoder, config: EngineConfig, streams: int, prompt_tokens: int, steps: int) -> None:
        tokens = needed_tokens(prompt_tokens, streams, steps)
        needed = streams * (tokens + 2 * config.block_size)
        self.engine = Engine.for_model(model, sized(config, needed, streams))
        self._streams, self._prompt_tokens, self._tokens = streams, prompt_tokens, tokens - prompt_tokens
        self._count = self._requests = 0

    def begin(self, choices: Sequence[AdapterChoice | None] = (None,)) -> None:
        """Let the streams decode with these adapters, in place of whatever decodes.

        Each prompt is computed by itself before and found again, so that the streams begin together.
        """
        self.end()
        asked = [(self._prompt(), choices[i % len(choices)]) for i in range(self._streams)]
        for prompt, choice in asked:
            self._add(prompt, choice, 1)
            self._settle()
        for prompt, choice in asked:
            self._add(prompt, choice, self._tokens)
        for _ in range(self._streams + WARM_STEPS):
            self.step()
        assert all(request.num_uncomputed == 1 for request in self.engine.scheduler.running.values())

    def step(self) -> float:
        """Milliseconds of a step."""
        began = time.perf_counter()
        self.engine.step()
        return 1e3 * (time.perf_counter() - began)

    def _prompt(self) -> list[int]:
        self._count += 1
        vocabulary = self.engine.capacity.vocab_size
        return [(self._count * 7919 + 31 * j) % vocabulary for j in range(self._prompt_tokens)]

    def _add(self, prompt: list[int], choice: AdapterChoice | None, tokens: int) -> None:
        self._requests += 1
        self.engine.add(str(self._requests), prompt, greedy(tokens), adapter=choice)

    def _settle(self) -> None:
        while self.engine.has_work or self.engine.arrivals:
            self.engine.arrivals.wait()
            self.engine.step()

    def end(self) -> None:
        for request_id in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.finish(request_id)


def needed_tokens(prompt_tokens: int, streams: int, steps: int) -> int:
    """Context of a stream that decodes for so many steps once all have begun and are warm."""
    return prompt_tokens + streams + WARM_STEPS + steps + 2


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def sized(config: EngineConfig, tokens: int, running: int) -> EngineConfig:
    running = max(running, config.max_running)
    return msgspec.structs.replace(
        config,
        kv_tokens=tokens,
        max_running=running,
        step_tokens=max(config.step_tokens, running),
    )


@contextmanager
def closing(*streams: Streams) -> Iterator[None]:
    try:
        yield
    finally:
        for own in streams:
            own.end()
            own.engine.close()


def interleaved(systems: Sequence[Streams], steps: int) -> list[float]:
    """Median milliseconds of each system's steps, one of each in turn, every second time backwards."""
    spent: list[list[float]] = [[] for _ in systems]
    for i in range(steps):
        for place in (range(len(systems)), reversed(range(len(systems))))[i % 2]:
            spent[place].append(systems[place].step())
    return [statistics.median(own) for own in spent]
