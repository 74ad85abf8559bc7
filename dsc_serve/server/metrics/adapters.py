"""What adapters are there and who used them, as families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsc_serve.adapter_choice import AdapterInfo
from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.server.metrics.families import Families, Labels, counter, counters, gauge, gauges, histogram

MOST_ADAPTERS = 256  # with series of their own
BASE, OTHER = "(base)", "(other)"


@dataclass(slots=True)
class AdapterUse:
    """Of one adapter's generations that have ended."""

    generations: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def add(self, prompt_tokens: int, tokens: int) -> None:
        self.generations += 1
        self.prompt_tokens += prompt_tokens
        self.tokens += tokens


def store_families(report: AdapterReport) -> Families:
    """What the engine tells of its adapters."""
    yield gauge("adapter_bytes", "Bytes of the adapters in memory.", report.nbytes)
    yield gauge("adapter_budget_bytes", "Bytes that they may take (adapter_bytes of the settings).", report.budget)
    yield gauge("adapter_requests_waiting", "Requests whose adapter is being read, or has no room.", report.waiting)
    yield counter("adapter_loads", "Adapters read into memory.", report.loads)
    yield counter("adapter_evictions", "Adapters that went from memory to make room.", report.evictions)
    yield counter("adapter_errors", "Adapters that were found not to be usable.", report.errors)
    yield counter(
        "adapter_read_bytes", "Bytes of the distinct adapters and bases of each step, summed.", report.read_bytes
    )
    yield histogram("step_adapters", "Distinct adapters in a step that has any.", report.distinct)


def adapter_families(known: Sequence[AdapterInfo], counts: Mapping[str, AdapterUse]) -> Families:
    broken = sum(bool(info.error) for info in known)
    loaded = sum(info.loaded for info in known)
    states: dict[Labels, float] = {
        ("loaded",): loaded,
        ("on disk",): len(known) - loaded - broken,
        ("broken",): broken,
    }
    yield gauges("adapters", "Adapters in the folder, by their state.", ("state",), states)
    label = ("adapter",)
    yield counters(
        "adapter_generations",
        f"Generations that ended; {BASE}: with none, (composition): several, {OTHER}: beyond {MOST_ADAPTERS} names.",
        label,
        {(name,): own.generations for name, own in counts.items()},
    )
    yield counters(
        "adapter_prompt_tokens",
        "Prompt tokens of these generations.",
        label,
        {(name,): own.prompt_tokens for name, own in counts.items()},
    )
    yield counters(
        "adapter_generated_tokens",
        "Tokens generated for them.",
        label,
        {(name,): own.tokens for name, own in counts.items()},
    )
