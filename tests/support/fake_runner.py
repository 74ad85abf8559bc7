"""A runner without a model: float64 logits from a hash of the tokens that the KV pool really holds.

Each computed token is written to its block and offset; logits are read back through the block table. So a wrong block,
a missing token or a stale one changes the output, as it would with a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_serve.config import EngineConfig
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.constraints import answered, answered_ahead, constrain
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.position import Position, PositionAhead, agreed
from dsc_serve.engine.request import Request
from dsc_serve.engine.sampler import Sampler, logprobs
from dsc_serve.engine.step_result import StepResult
from dsc_serve.engine.step_time import Estimate, Load, StepTime
from dsc_serve.sampling_params import EngineCapacity

VOCABULARY = 29
EOS = 0


def hashed_logits(tokens: Sequence[int]) -> Tensor:
    """Logits that depend on every token and its place: margins are wide, and a text ends now and then."""
    state = 1469598103934665603
    for token in tokens:
        state = ((state ^ (token + 1)) * 1099511628211) % 2**64
    generator = torch.Generator().manual_seed(state % 2**63)
    return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)


def with_adapter(tokens: Sequence[int], digest: str) -> list[int]:
    """What the pool holds of tokens that were computed with an adapter of this digest; "": with none."""
    if not digest:
        return list(tokens)
    own = VOCABULARY * (1 + int(digest[:12], 16))
    return [own + token for token in tokens]


def digest_of(request: Request) -> str:
    return "" if request.adapter is None else request.adapter.digest


class FakeRunner:
    """windows: of the groups of layers, 0: they see all; each must hold what the step's tokens see."""

    def __init__(
        self,
        blocks: int,
        block_size: int,
        fail_on: frozenset[str] = frozenset(),
        windows: tuple[int, ...] = (0,),
    ) -> None:
        self.block_size, self.fail_on, self.windows = block_size, fail_on, windows
        self.pool = [[-1] * block_size for _ in range(blocks)]
        self.sampler = Sampler([EOS])
        self.step_sizes: list[int] = []
        self.forward_s = 0.001  # that steps are taken to last, by which others wait for grammars

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        self.step_sizes.append(sum(count for _, count in work))
        result = StepResult()
        for request, count in work:
            if request.id in self.fail_on:
                raise RuntimeError("out of luck")
            for position in range(request.num_computed, request.num_computed + count):
                (held,) = with_adapter(request.span(position, position + 1), digest_of(request))
                for row in request.rows:
                    block = row[position // self.block_size]
                    self.pool[block][position % self.block_size] = held
        for request, count in work:
            end = request.num_computed + count
            known = with_adapter(request.span(0, end), digest_of(request))
            for row, window in zip(request.table.tolist(), self.windows, strict=True):
                first = max(0, request.num_computed + 1 - window) if window else 0
                seen = [self.pool[row[p // self.block_size]][p % self.block_size] for p in range(first, end)]
                assert seen == known[first:], "the KV pool does not hold what the request knows"
            if end < request.num_tokens or request.max_tokens == 0:
                continue
            if not all(answered([request], self.forward_s, True)[0]):
                result.late.add(request.id)
                continue
            ahead = [PositionAhead(request, drafts) for drafts in range(1, end - request.num_tokens + 1)]
            answered_ahead(ahead, self.forward_s, alone=True)
            self._draw(known, request, ahead, result)
        return result

    def _draw(self, held: list[int], request: Request, drafted: list[PositionAhead], result: StepResult) -> None:
        ahead = [position for position in drafted if position.known]
        sizes = range(request.num_tokens, request.num_tokens + len(ahead) + 1)
        logits = torch.stack([hashed_logits(held[:size]) for size in sizes])
        positions: list[Position] = [request, *ahead]
        raw = logits.clone()
        result.stuck |= constrain(logits, positions)
        for one in request.siblings:
            result.tokens[one.id] = self.sampler(logits[:1].clone(), [one])[0]
        tokens = self.sampler(logits.clone(), positions)
        result.tokens[request.id] = tokens[0]
        entries = {}
        if request.params.logprobs is not None:
            found = logprobs(raw, tokens, [request.params.logprobs] * len(tokens))
            result.logprobs[request.id] = found[0]
            entries = dict(enumerate(found[1:]))
        if drafted:
            counts = {request.id: len(drafted)}
            result.further |= agreed({request.id: tokens[0]}, counts, ahead, tokens[1:], entries)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        held = [list(self.pool[source]) for source, _ in pairs]
        for (_, target), block in zip(pairs, held, strict=True):
            self.pool[target] = block


@dataclass(frozen=True)
class LateStep:
    """A step of a `LateRunner`'s, whose tokens the host reads when it likes."""

    places: dict[str, int]
    result: StepResult
    events: list[str]
    forward_s: float = 0.0

    def read(self) -> StepResult:
        self.events.append("read")
        return self.result


class LateRunner(FakeRunner):
    """As a device computes: what a step draws stays there, is fed to the next step, and is told when it is read.

    events: launches and reads in their order, and steps that are waited for ("run"). flies: see `AheadRunner`.
    """

    flies = True

    def __init__(
        self,
        blocks: int,
        block_size: int,
        fail_on: frozenset[str] = frozenset(),
        windows: tuple[int, ...] = (0,),
    ) -> None:
        super().__init__(blocks, block_size, fail_on, windows)
        self.events: list[str] = []
        self._drawn: list[int] = []

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        self.events.append("run")
        assert not any(token >= VOCABULARY for request, _ in work for token in request.tokens), "nobody has read it"
        return super().run(work)

    def launch(self, work: Sequence[tuple[Request, int]]) -> LateStep:
        assert not any(request.needs_host or request.drafts for request, _ in work)
        self.events.append("launch")
        fed = [(request, request.tokens[-1]) for request, _ in work if request.tokens[-1] >= VOCABULARY]
        for request, place in fed:
            assert request.num_uncomputed == 1
            request.tokens[-1] = self._drawn[place - VOCABULARY]
        try:
            result = super().run(work)
        finally:
            for request, place in fed:
                request.tokens[-1] = place
        self._drawn = list(result.tokens.values())
        return LateStep({name: VOCABULARY + i for i, name in enumerate(result.tokens)}, result, self.events)


class FixedStepTime(StepTime):
    """Learns nothing."""

    def __init__(self, estimate: Estimate | None) -> None:
        super().__init__()
        self.estimate = estimate

    def observe(self, load: Load, ms: float) -> None:
        pass


def fake_engine(
    blocks: int = 12,
    block_size: int = 4,
    step_tokens: int = 16,
    max_running: int = 8,
    context: int = 64,
    policy: str = "fcfs",
    strict: bool = True,
    fail_on: frozenset[str] = frozenset(),
    prefix_cache: bool = True,
    estimate: Estimate | None = None,
    windows: tuple[int, ...] = (0,),
    adapters: Adapters | None = None,
    ahead: bool = False,
) -> Engine:
    """An engine whose scheduler, pool and commit are real and whose runner is fake; nothing depends on real time.

    estimate: what steps are taken to cost, whatever they do. windows: of the groups of layers that keep blocks. ahead:
    whether steps are launched before the last one's tokens have been read.
    """
    config = EngineConfig(
        block_size=block_size,
        step_tokens=step_tokens,
        max_running=max_running,
        kv_tokens=blocks * block_size,
        policy=policy,
        prefix_cache=prefix_cache,
    )
    late = LateRunner(blocks, block_size, fail_on, windows) if ahead else None
    runner = late or FakeRunner(blocks, block_size, fail_on, windows)
    capacity = EngineCapacity(VOCABULARY, context, blocks, block_size, kv_windows=windows, step_tokens=step_tokens)
    engine = Engine(config, capacity, runner, (EOS,), strict, adapters=adapters, ahead=late)
    engine.scheduler.step_time = FixedStepTime(estimate)
    engine.scheduler.clock = lambda: 0.0
    return engine


def alone(prompt: list[int], max_tokens: int, stops: Sequence[int] = (EOS,), digest: str = "") -> list[int]:
    """The greedy continuation, computed without any engine. digest: of the adapter."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(int(hashed_logits(with_adapter(tokens, digest)).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]
