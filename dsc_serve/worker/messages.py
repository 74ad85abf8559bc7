"""The typed messages between the API process and the engine process, as frames over a local socket."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo
from dsc_serve.config import EngineConfig
from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.engine.drafts.report import DraftReport
from dsc_serve.engine.output import Delta as Delta
from dsc_serve.engine.output import RoutingSlice as RoutingSlice
from dsc_serve.engine.output import TokenLogprobs as TokenLogprobs
from dsc_serve.engine.routing_report import RoutingReport
from dsc_serve.engine.step_report import PhaseReport, StepReport
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.frames import framed
from dsc_serve.pooling import Pooling
from dsc_serve.sampling_params import EmbeddingParams, EngineCapacity, SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.structured_outputs import StructuredOutputs

MAX_FRAME = 64 * 2**20


class Start(msgspec.Struct, tag=True, array_like=True):
    """First message to a new engine process."""

    config: EngineConfig


class Sibling(msgspec.Struct, array_like=True):
    """A further choice of a prompt."""

    request_id: str
    params: SamplingParams


class Submit(msgspec.Struct, tag=True, array_like=True):
    """Generate, or embed the prompt."""

    request_id: str
    prompt: list[int]  # token ids
    params: SamplingParams  # with n = 1
    scheduling: SchedulingParams = SchedulingParams()
    age_s: float = 0.0  # of the request's time, what has passed with an engine that is no more and without any
    siblings: list[Sibling] = []  # further choices of the prompt
    embedding: EmbeddingParams | None = None  # given: the prompt's vector is asked for, and no token
    adapter: AdapterChoice | None = None  # of all choices; None: the model as it is

    @property
    def ids(self) -> list[str]:
        return [self.request_id, *(one.request_id for one in self.siblings)]


class Finish(msgspec.Struct, tag=True, array_like=True):
    """End a request now."""

    request_id: str
    reason: str  # "stop": its stop string was found; "abort": nobody wants it any more


class StatsRequest(msgspec.Struct, tag=True, array_like=True):
    ticket: int


class CheckGrammar(msgspec.Struct, tag=True, array_like=True):
    """Have a grammar compiled, and tell by a `GrammarChecked` whether it can be used."""

    ticket: int
    asked: StructuredOutputs


class ForgetGrammar(msgspec.Struct, tag=True, array_like=True):
    """Nobody waits for this check any more."""

    ticket: int


class ListAdapters(msgspec.Struct, tag=True, array_like=True):
    """Ask for an `AdapterList`."""

    ticket: int


class ListTenants(msgspec.Struct, tag=True, array_like=True):
    """Ask for a `TenantList`."""

    ticket: int


class Shutdown(msgspec.Struct, tag=True, array_like=True):
    pass


class ModelInfo(msgspec.Struct, tag=True, array_like=True, kw_only=True):
    """What the engine loaded. Sent once, when it is ready."""

    capacity: EngineCapacity
    dtype: str  # that it computes in
    device: str
    threads: int  # that a step computes with
    kernels: str  # the backend, as `inspect` names it
    policy: str
    total_parameters: int
    active_parameters: int  # of those, what one token reads
    fingerprint: str = ""  # see `model.fingerprint`; "": of no files
    pooling: Pooling = Pooling()  # how prompts are embedded
    weight_bytes: dict[str, int] = {}  # of matrices, by the form that they are held in
    kv_token_bytes: int = 0  # what a token takes in the KV pool
    captured: str = ""  # which steps are replayed from graphs, and what capturing took, in words


class StartFailed(msgspec.Struct, tag=True, array_like=True):
    error: str


class StepDone(msgspec.Struct, tag=True, array_like=True):
    """All that one step has to say, in one message."""

    deltas: list[Delta]


class Stats(msgspec.Struct, tag=True, array_like=True, kw_only=True):
    """The engine's state at the moment of asking. Counts are since it began."""

    ticket: int  # of the question
    running: int  # requests
    waiting: int
    blocks_free: int  # of the KV pool
    blocks_cached: int  # kept for prefixes, and given up when they are needed
    blocks_total: int
    steps: int
    preemptions: int
    timeouts: int
    prompt_tokens: int
    cached_tokens: int  # of those, found in the prefix cache
    invariant_repairs: int  # faults of the pool that were found and mended
    routing: RoutingReport | None = None  # None: this kind of FFN routes nothing
    bank_bytes: int = 0  # of all layers' atoms
    device: str = "cpu"
    step_report: StepReport = msgspec.field(default_factory=StepReport)
    phases: PhaseReport = msgspec.field(default_factory=PhaseReport)
    held_back: dict[str, int] = {}  # see `Scheduler.held_back`
    drafts: DraftReport = msgspec.field(default_factory=DraftReport)
    adapters: AdapterReport | None = None  # None: there is no folder of them


class GrammarChecked(msgspec.Struct, tag=True, array_like=True):
    """The answer to a `CheckGrammar`."""

    ticket: int
    error: str  # "" where the grammar can be used
    full: bool = False  # it has not been looked at, since too many wait
    lost: bool = False  # nobody can say: the processes of grammars have ended or cannot be had


class AdapterList(msgspec.Struct, tag=True, array_like=True):
    """The adapters that there are, broken ones among them. Those that nobody has asked for may not have been read."""

    ticket: int
    adapters: list[AdapterInfo]


class TenantList(msgspec.Struct, tag=True, array_like=True):
    """What tenants of the model's bank have picked."""

    ticket: int
    report: TenantsReport


ToEngine = Start | Submit | Finish | StatsRequest | CheckGrammar | ForgetGrammar | ListAdapters | ListTenants | Shutdown
FromEngine = ModelInfo | StartFailed | StepDone | Stats | GrammarChecked | AdapterList | TenantList

encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """Raises ValueError for a message that is too large."""
    return framed(encoder.encode(message), MAX_FRAME)


def frames(deltas: list[Delta]) -> Iterator[bytes]:
    """One step's news, in one message or, where that would be too large, in several."""
    body = encoder.encode(StepDone(deltas))
    if len(body) > MAX_FRAME and len(deltas) > 1:
        middle = len(deltas) // 2
        yield from frames(deltas[:middle])
        yield from frames(deltas[middle:])
    else:
        yield framed(body, MAX_FRAME)
