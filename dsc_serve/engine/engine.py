"""The engine: requests in, deltas out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.config import ConfigError, EngineConfig, resolve_model
from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.arrivals import Arrivals, adapters_of, count_adapters, hold
from dsc_serve.engine.companion import companion_drafts, load_companion
from dsc_serve.engine.constraints import End, Followers
from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.drafter import Drafter
from dsc_serve.engine.drafts.drafting import COMPANION
from dsc_serve.engine.isolation import Computed, StepRunner
from dsc_serve.engine.kv_cache import BlockPool
from dsc_serve.engine.kv_size import pool_blocks
from dsc_serve.engine.output import Delta, refusal
from dsc_serve.engine.pace import AheadRunner, Alternating, PacedStep, StepAhead
from dsc_serve.engine.policies import POLICIES, StepBudget
from dsc_serve.engine.pooling import Pooler
from dsc_serve.engine.position import add_further
from dsc_serve.engine.request import Collect, Request
from dsc_serve.engine.routing import RoutingWatch
from dsc_serve.engine.runner import runner_of
from dsc_serve.engine.scheduler import Scheduler
from dsc_serve.engine.step_report import StepReport
from dsc_serve.grammars.constraint import Constraint
from dsc_serve.grammars.follower import GrammarLimits, Grammars
from dsc_serve.grammars.schema import FIELD
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.model.ffn.picks import picking_layers
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.pooling import Pooling, pooling_of
from dsc_serve.sampling_params import (
    EmbeddingParams,
    EngineCapacity,
    SamplingParams,
    check_embedding,
    resolve_max_tokens,
)
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsc_serve.engine.ranks.leader import Ranks

log = logging.getLogger(__name__)


@dataclass
class Counters:
    steps: int = 0
    repairs: int = 0


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls everything.

    strict: raise when an invariant is broken after a step (tests) instead of counting and repairing (production).
    ahead: the runner, where steps are launched before the last one's tokens have been read.
    """

    def __init__(
        self,
        config: EngineConfig,
        capacity: EngineCapacity,
        runner: StepRunner,
        eos: tuple[int, ...],
        strict: bool = False,
        tokenizer: Tokenizer | None = None,
        routing: RoutingWatch | None = None,
        adapters: Adapters | None = None,
        ahead: AheadRunner | None = None,
    ) -> None:
        if config.policy not in POLICIES:
            raise ConfigError(f"policy {config.policy!r} is not known; allowed: {', '.join(POLICIES)}")
        self.config, self.capacity, self.runner, self.strict = config, capacity, runner, strict
        budget = StepBudget(config.step_tokens, config.max_running, config.itl_target_ms)
        pool = BlockPool(capacity.num_blocks, len(capacity.kv_windows))
        self.drafter = Drafter(config.drafts, config.step_tokens, eos)
        policy, windows = POLICIES[config.policy], capacity.kv_windows
        self.scheduler = Scheduler(policy, budget, pool, config.block_size, config.prefix_cache, windows=windows)
        self.arrivals = Arrivals(adapters, lambda: self.scheduler.clock())
        self.pace = Alternating(strict)
        if ahead is not None:
            self.pace = StepAhead(ahead, self.scheduler, lambda request: self.drafter.may_draft(request), strict)
        self.counters = Counters()
        self.report = StepReport()
        self.adapter_report = AdapterReport()
        self.routing = routing
        if routing is not None:
            routing.predicts = POLICIES[config.policy].by_picks
        self.bank_bytes, self.captured = 0, ""
        self.ranks: Ranks | None = None  # the others that share the model
        self.pooling = Pooling()
        self._eos = frozenset(eos)
        self.grammars: Grammars | None = None
        if tokenizer is not None:
            self.grammars = Grammars(tokenizer, capacity.vocab_size, eos, grammar_limits(config))
        self.followers = Followers(lambda request: self.scheduler.get(request.id) is request)

    @classmethod
    def for_model(
        cls, model: Decoder, config: EngineConfig, strict: bool = False, ranks: Ranks | None = None
    ) -> Engine:
        """An engine that runs a loaded model, with a KV pool of its own. ranks: those that share it, which it then has.

        Raises ConfigError and CheckpointError where its draft model, or another rank's part, cannot be used.
        """
        picked, picking = picking_layers(model.config)
        tokenizer = Tokenizer.load(resolve_model(config.model))
        companion = load_companion(config, model, tokenizer) if config.draft_model else None
        blocks = pool_blocks(model, config, companion)
        capacity = EngineCapacity(
            vocab_size=model.config.vocab_size,
            max_model_len=model.config.max_position_embeddings,
            num_blocks=blocks if ranks is None else ranks.blocks(blocks),
            kv_windows=model.groups.windows,
            step_tokens=config.step_tokens,
            block_size=config.block_size,
            picks=picked.of,
            picking=picking,
            picks_per_token=picked.per_token,
            pickable=picked.rows,
            max_drafts=config.drafts,
            hidden_size=model.config.hidden_size,
        )
        runner = runner_of(model, config, capacity) if ranks is None else ranks.runner(model, config, capacity)
        eos, adapters = model.config.eos_token_ids, adapters_of(model, config)
        ahead = runner if runner.flies else None
        engine = cls(config, capacity, runner, eos, strict, tokenizer, runner.routing, adapters, ahead)
        engine.ranks = ranks
        if companion is not None:
            kinds = {**SOURCES, COMPANION: companion_drafts(config, companion, capacity).kind()}
            engine.drafter = Drafter(config.drafts, config.step_tokens, eos, kinds)
        engine.pooling = pooling_of(resolve_model(config.model), config.pooling)
        engine.captured = runner.captured
        engine.bank_bytes = sum(layer.bank_bytes for layer in dsc_layers(model))
        return engine

    @property
    def has_work(self) -> bool:
        return not self._is_idle or self.pace.in_flight is not None or self.arrivals.restless

    @property
    def _is_idle(self) -> bool:
        """Whether there is nobody to plan for."""
        return not self.scheduler.running and not self.scheduler.waiting

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        collect: Collect | None = None,
        scheduling: SchedulingParams | None = None,
        age_s: float = 0.0,
        siblings: Sequence[tuple[str, SamplingParams]] = (),
        embedding: EmbeddingParams | None = None,
        adapter: AdapterChoice | None = None,
    ) -> Request:
        """Queue a request, which may have waited elsewhere for `age_s` of its time.

        siblings: ids and parameters of further choices of the same prompt, which is computed once for all of them; the
            parameters may differ in how tokens are chosen and when to stop, not in what is reported of the prompt.
        embedding: where given, the prompt's vector comes with its end; `params` are then EMBEDDED.
        collect: given the first of some prompt positions and their float32 logits, what to keep of them in
            `Request.collected`; they come in order.
        adapter: what it and its siblings are computed with; until that is in memory they wait outside the queue.
        Raises ParameterError when it could never finish here, ValueError when its id is in use, GrammarsFullError when
        too many grammars wait before its own, GrammarsLostError when no process can be had for it; UnknownAdapterError
        and BrokenAdapterError, which are ParameterErrors, too.
        """
        family: list[Request] = []
        try:
            for one_id, own in ((request_id, params), *siblings):
                if self._get(one_id) is not None or one_id in [one.id for one in family]:
                    raise ValueError(f"request id {one_id!r} is in use")
                max_tokens = resolve_max_tokens(prompt, own, self.capacity)
                one = Request(
                    one_id, len(prompt), list(prompt), own, max_tokens, collect, scheduling or SchedulingParams()
                )
                if embedding is not None:
                    check_embedding(embedding, self.capacity)
                    one.pooler = self._pooler(embedding, len(prompt))
                one.constraint = self._constraint(own)
                family.append(one)
            wanted = None if adapter is None else self.arrivals.want(adapter)
        except BaseException:
            for one in family:
                one.close()
            raise
        request, *request.siblings = family
        if wanted is None:
            self._queue(request, age_s)
        elif wanted.lease is not None:
            hold(wanted.lease, family)
            self._queue(request, age_s)
        else:
            self.arrivals.add(request, wanted, age_s)
        return request

    def _queue(self, request: Request, age_s: float) -> None:
        """Everything that a request and its siblings need is there."""
        for one in (request, *request.siblings):
            if one.adapter is not None:
                self.adapter_report.count_request(one.adapter.name, self.arrivals.names)
            if self.routing is not None:
                self.routing.expect(one)
            if one.constraint is not None:
                self.followers.add(one)
        self.scheduler.add(request, age_s)

    def _get(self, request_id: str) -> Request | None:
        return self.scheduler.get(request_id) or self.arrivals.get(request_id)

    def check(self, params: SamplingParams) -> None:
        """Wait until it is known whether a request's grammar can be used. Raises ParameterError where it cannot."""
        if params.structured_outputs is not None:
            self.usable_grammars().compile(params.structured_outputs)

    def usable_grammars(self) -> Grammars:
        """Raises ParameterError where this model can follow none."""
        if self.grammars is None:
            raise ParameterError(FIELD, f"{FIELD} cannot be used: this model has no tokenizer")
        return self.grammars

    def close(self) -> None:
        """End the processes of grammars and of other ranks. Safe to call twice."""
        if self.grammars is not None:
            self.grammars.close()
        if self.arrivals.adapters is not None:
            self.arrivals.adapters.close()
        if self.ranks is not None:
            self.ranks.close()

    def finish(self, request_id: str) -> bool:
        """End a request wherever it stands. Returns whether there was one."""
        found = (self.scheduler.finish(request_id) or self.arrivals.finish(request_id)) is not None
        self.followers.prune()
        return found

    def step(self) -> list[Delta]:
        """Plan, compute and commit one step; returns the news of the requests it moved.

        A request that makes its step fail ends with an error; the others go on.
        """
        started = time.perf_counter()
        late = self.arrivals.expire() if self.arrivals else []
        self.scheduler.timeouts += len(late)
        expired = self.scheduler.expire() + late
        deltas = [self._expired(request, field) for request, field in expired]
        deltas += self._arrived() + self._grammar_ends()
        if self._is_idle:
            return deltas + self._news(self.pace.land())
        plan = self.scheduler.plan()
        if self.pace.in_flight is not None and not self.pace.may_fly(plan):
            deltas += self._news(self.pace.land())
            started, plan = time.perf_counter(), self.scheduler.plan()
        plan = self.drafter.add(plan, self.scheduler.running, self.scheduler.step_time)
        if not plan.tokens and (self._is_idle or self.followers.wait()):
            return deltas + self._grammar_ends()
        work = self.scheduler.begin(plan)
        if self.scheduler.copies:  # most steps have none, and entering inference mode takes 1 % of a short step
            self.runner.copy_blocks(self.scheduler.copies)
        step = PacedStep(plan, work, started, time.perf_counter() - started)
        return deltas + self._news(self.pace.compute(self.runner, step))

    def _news(self, steps: Iterable[PacedStep]) -> list[Delta]:
        """Commit steps that have been computed; returns the news of the requests that they moved."""
        return [delta for step in steps for delta in self._commit(step)]

    def _commit(self, step: PacedStep) -> list[Delta]:
        plan, work, done = step.plan, step.work, step.done
        result = done.result
        deltas = [self._failed(request_id, error) for request_id, error in done.errors.items()]
        deltas += [self._stuck(request, result.stuck[request.id]) for request, _ in work if request.id in result.stuck]
        if done.fewer:
            plan.shorten(done.fewer)
        for request_id in result.late:
            self.followers.hold(request_id)
            if request_id in plan.tokens:  # its last token is computed again when it can be sampled
                plan.tokens[request_id] -= 1
        told = [one for request, _ in work for one in (request, *request.siblings)]
        ended = self.scheduler.commit(plan, result.tokens, self._eos, result.further)
        if plan.drafts:
            self.drafter.learn(plan, result.further)
        self._check()
        if not plan.tokens:  # all have ended since it was launched
            return deltas
        self.counters.steps += 1
        if not done.errors and not done.fewer:
            waited_s = result.waited_s + result.foreseen_s + self.drafter.making_s
            self.scheduler.step_time.observe(plan.load, 1e3 * (time.perf_counter() - step.since - waited_s))
            self.scheduler.step_time.drafts.observe_masks(plan.load.masks, 1e3 * result.foreseen_s)
        deltas += [delta for request in told if (delta := self._progress(request, done, ended)) is not None]
        if result.further:
            add_further(deltas, result.further, plan.drafts)
        if result.late:
            deltas += self._grammar_ends()
        if self.followers:
            self.followers.prune()
        parts = step.since, step.schedule_s, result.forward_s, step.computing_s, step.computed
        self.report.add(*parts, plan.computed(), plan.load.tokens > 0)
        if self.arrivals.adapters is not None and any(request.adapter is not None for request, _ in work):
            count_adapters(self.adapter_report, work, self.arrivals.names)
        return deltas

    def _progress(self, request: Request, done: Computed, ended: Mapping[str, str | None]) -> Delta | None:
        """What a step has to say of a request that it computed; None where nothing, or where it has failed."""
        result, request_id = done.result, request.id
        prompt_logprobs, routing = result.prompt_logprobs.get(request_id), result.routing.get(request_id)
        failed = request_id in done.errors or request_id in result.stuck
        if failed or (request_id not in ended and prompt_logprobs is None and routing is None):
            return None
        token, entry = result.tokens.get(request_id), result.logprobs.get(request_id)
        return Delta(
            request_id,
            [] if token is None else [token],
            ended.get(request_id),
            None if entry is None else [entry],
            prompt_logprobs,
            cached_tokens=request.cached_tokens or 0,
            queued_s=request.queued_s,
            routing=routing,
            embedding=result.embeddings.get(request_id),
        )

    def _failed(self, request_id: str, error: Exception) -> Delta:
        self.scheduler.finish(request_id)
        return Delta(request_id, [], "error", error=f"the step failed: {type(error).__name__}: {error}")

    def _stuck(self, request: Request, reason: str) -> Delta:
        self.scheduler.finish(request.id)
        return blame(Delta(request.id, [], "error", error=reason), request)

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        asked = params.structured_outputs
        return None if asked is None else self.usable_grammars().constraint(asked)

    def _pooler(self, embedding: EmbeddingParams, prompt_size: int) -> Pooler:
        if self.pooling.fault:
            raise ParameterError("model", f"model cannot embed texts: {self.pooling.fault}")
        return Pooler(self.pooling, embedding, prompt_size)

    def _grammar_ends(self) -> list[Delta]:
        return [self._ended(end) for end in self.followers.resume()] if self.followers else []

    def _ended(self, end: End) -> Delta:
        self.scheduler.finish(end.request.id)
        self.followers.prune()
        news = Delta(end.request.id, [], end.finish_reason, cached_tokens=end.request.cached_tokens or 0)
        news.error = end.error
        return blame(news, end.request) if end.error else news

    def _arrived(self) -> list[Delta]:
        """Queue the requests whose adapters are there; the news of those whose are not."""
        failed = []
        for request, age_s, error in self.arrivals.take_resolved():
            if error is None:
                self._queue(request, age_s)
            else:
                failed.append(refusal(request.id, error))
        return failed

    def _expired(self, request: Request, field: str) -> Delta:
        error, cached_tokens = request.scheduling.overdue(field), request.cached_tokens or 0
        return Delta(request.id, [], "timeout", error=error, cached_tokens=cached_tokens)

    def _check(self) -> None:
        fault = self.scheduler.fault() if self.strict or not self.has_work else None
        if fault is None:
            return
        if self.strict:
            raise AssertionError(fault)
        self.counters.repairs += 1
        pool = self.scheduler.pool
        self.scheduler.pool = BlockPool(pool.total, pool.groups)  # nothing runs or waits: every block is free


def blame(news: Delta, request: Request) -> Delta:
    """Say of an error in following a grammar whose fault it is."""
    news.unavailable = request.constraint is not None and request.constraint.blameless
    news.error_field = "" if news.unavailable else FIELD
    return news


def grammar_limits(config: EngineConfig) -> GrammarLimits:
    memory, together = config.grammar_memory_mb << 20, config.grammars_memory_mb << 20
    return GrammarLimits(config.grammar_timeout_s, memory, together, config.drafts)
