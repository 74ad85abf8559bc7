"""An engine without a model: says what it is told to say, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncGenerator, Callable

import llguidance
import msgspec
import numpy as np

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo
from dsc_serve.engine.routing_report import RoutingReport
from dsc_serve.engine.step_report import PhaseReport, StepReport
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.grammars.compile import compiled
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.pooling import Pooling
from dsc_serve.sampling_params import ALL_ATOMS, EmbeddingParams, EngineCapacity, SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.worker.client import EngineDiedError, Family
from dsc_serve.worker.messages import Delta, GrammarChecked, ModelInfo, RoutingSlice, Stats, TokenLogprobs

VOCAB = 300

CONTEXT = 512
Script = Callable[[list[int], SamplingParams], list[int]]


@functools.cache
def bytes_as_tokens() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def counting(prompt: list[int], params: SamplingParams) -> list[int]:
    """Letters from "a" on, shifted by the seed, for ever."""
    return [97 + (i + (params.seed or 0)) % 26 for i in range(CONTEXT)]


def saying(text: str) -> Script:
    """The bytes of a text, then the end."""
    return lambda prompt, params: list(text.encode())


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, [(97 + i, -1.0 - i if i < 2 else -math.inf) for i in range(count)])


def routing_of(start: int, count: int, params: SamplingParams) -> RoutingSlice:
    """Atoms that say where they are from: 100 · position + 10 · layer + rank."""
    k = 3 if params.routing == ALL_ATOMS else params.routing
    origins = np.arange(start, start + count)[:, None, None] * 100 + np.arange(2)[None, :, None] * 10
    atoms = origins + np.arange(k)[None, None]
    coefficients, signal = np.full(atoms.shape, 0.25, np.float32), np.full(atoms.shape[:2], 1.5, np.float32)
    return RoutingSlice.packed(start, atoms, coefficients, signal)


def vector_of(prompt: list[int], params: EmbeddingParams) -> bytes:
    """Its size and its first token's number, then nothing."""
    return np.array([len(prompt), prompt[0], 0, 0][: params.dimensions], "<f4").tobytes()


class FakeEngine:
    """`delay_s` before every token. `fail_after` tokens comes an error; with `die` the whole engine is gone then.

    `gate`, where set, holds every request back until it opens.
    """

    def __init__(self, script: Script = counting, delay_s: float = 0.0) -> None:
        self.script = script
        self.delay_s = delay_s
        self.fail_after: int | None = None
        self.error = Delta("", [], "error", error="the engine broke")
        self.die = False
        self.raises: Exception | None = None
        self.ends_silently = False
        self.mute_stats = False
        self.gate: asyncio.Event | None = None
        self.tokens_per_step = 1
        self.capacity = EngineCapacity(
            *(VOCAB, CONTEXT),
            num_blocks=64,
            block_size=16,
            picks="atoms",
            picking=(0, 1),
            picks_per_token=3,
            pickable=500,
            hidden_size=4,
            max_drafts=7,
        )
        self.submitted: list[tuple[str, list[int], SamplingParams]] = []
        self.scheduling: list[SchedulingParams] = []
        self.finished: list[tuple[str, str]] = []
        self.aborted: list[str] = []
        self.running = self.checking = 0
        self.routing: RoutingReport | None = None
        self.step_report, self.phases = StepReport(), PhaseReport()
        self.alive = True
        self.hung = False
        self.gave_up = False
        self.restarts = 0
        self.ended = ""
        self.policy = "fcfs"
        self.cached_tokens = 0
        self.prediction = (0, 0)  # of every delta of a request with a prediction
        self.pooling = Pooling()
        self.adapter_infos: list[AdapterInfo] = []
        self.tenants_report = TenantsReport()
        self.adapters_asked: list[AdapterChoice | None] = []  # one for each that was submitted

    async def adapters(self, timeout_s: float = 1.0) -> list[AdapterInfo]:
        if not self.alive:
            raise EngineDiedError("the engine process has ended")
        return self.adapter_infos

    async def tenants(self, timeout_s: float = 1.0) -> TenantsReport:
        if not self.alive:
            raise EngineDiedError("the engine process has ended")
        return self.tenants_report

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(
            capacity=self.capacity,
            dtype="float32",
            device="cpu",
            threads=1,
            kernels="none",
            policy=self.policy,
            total_parameters=0,
            active_parameters=0,
            pooling=self.pooling,
        )

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        scheduling: SchedulingParams | None = None,
        family: Family | None = None,
        embedding: EmbeddingParams | None = None,
        adapter: AdapterChoice | None = None,
    ) -> AsyncGenerator[Delta, None]:
        if not self.alive:
            raise EngineDiedError("the engine process has ended")
        assert request_id not in [name for name, _, _ in self.submitted]
        assert params.n == 1
        self.submitted.append((request_id, prompt, params))
        self.adapters_asked.append(adapter)
        self.scheduling.append(scheduling or SchedulingParams())
        self.running += 1
        ended = False
        try:
            if self.gate is not None:
                await self.gate.wait()
                self._check_ended()
            for delta in self._deltas(request_id, prompt, params):
                delta.embedding = None if embedding is None else vector_of(prompt, embedding)
                await asyncio.sleep(self.delay_s)
                self._check_ended()
                if self.raises is not None and delta.token_ids:
                    raise self.raises
                ended = delta.finish_reason is not None
                self.alive = self.alive and not (self.die and delta.finish_reason == "error")
                yield delta
            ended = True
        finally:
            self.running -= 1
            if not ended:
                self.aborted.append(request_id)

    def _deltas(self, request_id: str, prompt: list[int], params: SamplingParams) -> list[Delta]:
        deltas: list[Delta] = []
        if params.prompt_logprobs is not None:
            whole = [None, *(logprobs_of(token, params.prompt_logprobs) for token in prompt[1:])]
            deltas = [Delta(request_id, [], prompt_logprobs=part) for part in (whole[:1], whole[1:]) if part]
        if params.routing:
            deltas.append(Delta(request_id, [], routing=routing_of(0, len(prompt), params)))
        limit = CONTEXT - len(prompt) if params.max_tokens is None else params.max_tokens
        tokens = self.script(prompt, params)
        kept = tokens[:limit]
        for i in range(0, len(kept), self.tokens_per_step):
            if self.fail_after is not None and i >= self.fail_after:
                break
            step = kept[i : i + self.tokens_per_step]
            logprobs = None if params.logprobs is None else [logprobs_of(token, params.logprobs) for token in step]
            delta = Delta(request_id, step, logprobs=logprobs, cached_tokens=self.cached_tokens, queued_s=0.25)
            if params.prediction_token_ids:
                delta.prediction = self.prediction
            if params.routing:
                new = len(step) - (i == 0)  # the prompt's last token is not computed again
                delta.routing = routing_of(len(prompt) + max(i - 1, 0), new, params)
            deltas.append(delta)
        if self.fail_after is not None:
            return [*deltas, msgspec.structs.replace(self.error, request_id=request_id)]
        if self.ends_silently:
            return deltas
        reason = "length" if len(tokens) >= limit else "stop"
        if deltas and deltas[-1].token_ids:
            deltas[-1].finish_reason = reason
        else:
            deltas.append(Delta(request_id, [], reason))
        return deltas

    def finish(self, request_id: str, reason: str) -> None:
        self.finished.append((request_id, reason))

    @property
    def in_flight(self) -> int:
        return self.running

    @property
    def heartbeat_age_s(self) -> float:
        return 7.5 if self.hung else 0.25

    @property
    def trouble(self) -> str:
        if not self.alive:
            return "the engine process has ended"
        return "the engine has not answered for 7 s" if self.hung else ""

    def end_all(self, reason: str) -> None:
        self.ended = reason
        if self.gate is not None:
            self.gate.set()

    def _check_ended(self) -> None:
        if self.ended:
            raise EngineDiedError(self.ended)

    async def check_grammar(self, asked: StructuredOutputs) -> GrammarChecked:
        """Compiles it here and now."""
        if not self.alive:
            raise EngineDiedError("the engine process has ended")
        self.checking += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.checking -= 1
        try:
            compiled(asked, bytes_as_tokens())
        except ParameterError as error:
            return GrammarChecked(0, str(error))
        return GrammarChecked(0, "")

    async def stats(self, timeout_s: float = 1.0) -> Stats:
        if not self.alive:
            raise EngineDiedError("the engine process has ended")
        if self.mute_stats:
            await asyncio.sleep(0)
            raise TimeoutError
        return Stats(
            ticket=0,
            running=self.running,
            waiting=3,
            blocks_free=58,
            blocks_cached=2,
            blocks_total=64,
            steps=7,
            preemptions=2,
            timeouts=1,
            prompt_tokens=90,
            cached_tokens=32,
            invariant_repairs=0,
            routing=self.routing,
            bank_bytes=4096,
            device="cuda",
            step_report=self.step_report,
            phases=self.phases,
            held_back={"preempted": 0, "running": 0, "blocks": 3, "step": 0},
        )
