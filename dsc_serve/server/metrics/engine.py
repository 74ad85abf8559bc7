"""What the engine reports of itself, as families."""

from __future__ import annotations

from typing import Protocol

from dsc_serve import __version__
from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.engine.drafts.report import DraftReport
from dsc_serve.server.metrics.adapters import store_families
from dsc_serve.server.metrics.families import Families, Labels, counter, counters, gauge, gauges, histogram
from dsc_serve.server.metrics.routing import routing_families
from dsc_serve.worker.messages import ModelInfo, Stats


class WatchedEngine(Protocol):
    """What metrics need of the server's engine."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def alive(self) -> bool: ...

    @property
    def restarts(self) -> int: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def heartbeat_age_s(self) -> float: ...

    async def stats(self, timeout_s: float = 1.0) -> Stats: ...


def process_families(engine: WatchedEngine, heartbeat_age_s: float) -> Families:
    """Of the engine process, whether it answers or not. heartbeat_age_s: before the scrape asked it."""
    model = engine.model
    labels = ("version", "dtype", "device", "kernels", "policy")
    facts = (__version__, model.dtype, model.device, model.kernels, model.policy)
    yield gauges("engine_info", "Always 1; the labels say what runs.", labels, {facts: 1})
    forms: dict[tuple[str, ...], float] = {(form,): size for form, size in model.weight_bytes.items()}
    yield gauges("weight_bytes", "Of the model's matrices, by what they are held in.", ("held_in",), forms)
    yield gauge("kv_token_bytes", "What a token takes in the KV pool.", model.kv_token_bytes)
    yield gauge("engine_up", "1 while the engine process is alive.", engine.alive)
    yield counter("engine_restarts", "Times that the engine was started again.", engine.restarts)
    yield gauge(
        "engine_heartbeat_age_seconds",
        "Since the engine process last said anything; it is asked every `ping_s`.",
        heartbeat_age_s,
    )
    yield gauge("requests_followed", "Generations that wait for the engine's news.", engine.in_flight)


def engine_families(stats: Stats) -> Families:
    """What an engine that answers tells."""
    yield gauge("requests_running", "Generations that the engine computes.", stats.running)
    yield gauge("requests_waiting", "Generations in the engine's queue.", stats.waiting)
    yield gauges(
        "requests_waiting_by_reason",
        "Generations in the engine's queue by what they wait for: KV blocks after a preemption, a place to run, KV "
        "blocks, or a step with tokens to spare.",
        ("reason",),
        {(reason,): count for reason, count in stats.held_back.items()},
    )
    used = stats.blocks_total - stats.blocks_free - stats.blocks_cached
    yield gauges(
        "kv_blocks",
        "Blocks of the KV pool; cached ones hold prefixes that may be wanted again, and are given away like free ones.",
        ("state",),
        {("free",): stats.blocks_free, ("cached",): stats.blocks_cached, ("used",): used},
    )
    yield counter("preemptions", "Running generations put back into the queue.", stats.preemptions)
    yield counter("timeouts", "Generations that the engine ended because their time was over.", stats.timeouts)
    yield counter("prefix_asked_tokens", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens)
    yield counter(
        "prefix_cached_tokens",
        "Prompt tokens found in the prefix cache, so that they need no computing.",
        stats.cached_tokens,
    )
    yield from step_families(stats)
    yield from draft_families(stats.drafts)
    phases = stats.phases
    yield histogram("request_queue_seconds", "From a generation's arrival to its admission.", phases.queue)
    yield histogram("request_prefill_seconds", "From a generation's admission to its first token.", phases.prefill)
    yield histogram("request_decode_seconds", "From a generation's first token to its end.", phases.decode)
    yield counter("invariant_repairs", "Broken invariants that the engine repaired: a defect.", stats.invariant_repairs)
    yield gauges(
        "bank_resident_bytes", "Bytes of atoms on the device.", ("device",), {(stats.device,): stats.bank_bytes}
    )
    yield from store_families(stats.adapters or AdapterReport())
    if stats.routing is not None:
        yield from routing_families(stats.routing)


def step_families(stats: Stats) -> Families:
    steps = stats.step_report
    yield counter("engine_steps", "Steps of the engine.", stats.steps)
    yield counter("engine_prompt_steps", "Steps of the engine that computed a part of a prompt.", steps.prompts)
    yield histogram("step_seconds", "A step, without telling its results to the API process.", steps.seconds)
    yield counters(
        "step_part_seconds",
        "Seconds of all steps by part: schedule, forward, sample (with the head; on a GPU, with the wait for it) and "
        "output (with telling the API process).",
        ("part",),
        {
            ("schedule",): steps.schedule_s,
            ("forward",): steps.forward_s,
            ("sample",): steps.sample_s,
            ("output",): steps.output_s,
        },
    )
    yield histogram("step_tokens", "Tokens computed in a step.", steps.tokens)
    yield histogram("step_requests", "Generations computed in a step.", steps.requests)


def draft_families(drafts: DraftReport) -> Families:
    """What speculation does; nothing of a source that has not drafted."""
    drafted: dict[Labels, float] = {(source,): count for source, count in drafts.drafted.items()}
    accepted: dict[Labels, float] = {(source,): count for source, count in drafts.accepted.items()}
    yield counters("draft_tokens", "Drafts that steps computed, by where they came from.", ("source",), drafted)
    yield counters("draft_accepted_tokens", "Of the drafts, those that proved right.", ("source",), accepted)
    yield histogram("draft_width", "Drafts of a generation in a step, where it had any.", drafts.width)
