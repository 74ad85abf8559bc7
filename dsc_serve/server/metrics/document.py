"""Every metric in Markdown, from the families themselves."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.drafting import COMPANION
from dsc_serve.engine.drafts.report import DraftReport
from dsc_serve.engine.routing_report import LayerRouting, RoutingReport
from dsc_serve.engine.step_report import HELD_BACK
from dsc_serve.sampling_params import EngineCapacity
from dsc_serve.server.admission import Permits
from dsc_serve.server.metrics.families import PREFIX
from dsc_serve.server.metrics.requests import Metrics
from dsc_serve.worker.messages import ModelInfo, Stats

SECTIONS = {  # by what their names begin with; the first that fits
    "DSC": ("routing_", "bank_"),
    "Adapters": ("adapter", "step_adapters"),
    "The engine": ("engine_", "step_", "kv_", "prefix_", "preemptions", "invariant_", "draft_"),
    "Requests and the HTTP edge": ("",),
}
CHOSEN = (
    "finish_reason",
    "reason",
    "state",
    "part",
    "path",
    "order",
    "form",
    "source",
)  # labels whose every value is listed
NOTHING: dict[str, Any] = {field.name: 0 for field in msgspec.structs.fields(Stats) if field.required}


class NewEngine:
    """An engine with a DSC model that has done nothing yet, for the names of what it tells."""

    alive, restarts, in_flight, heartbeat_age_s = True, 0, 0, 0.0
    model = ModelInfo(
        capacity=EngineCapacity(vocab_size=1, max_model_len=1, num_blocks=1, block_size=1),
        dtype="",
        device="",
        kernels="",
        policy="",
        threads=0,
        total_parameters=0,
        active_parameters=0,
        weight_bytes={"": 0},
    )

    async def stats(self, timeout_s: float = 1.0) -> Stats:
        routing = RoutingReport(0, 0, 0, 0, [LayerRouting(0, 0)])
        held_back, drafts = dict.fromkeys(HELD_BACK, 0), DraftReport.of((*SOURCES, COMPANION))
        return Stats(**NOTHING, held_back=held_back, routing=routing, drafts=drafts, adapters=AdapterReport())


def families() -> list[Metric]:
    """Of a server that has answered one request, as a scrape tells them; those of the process itself are left out."""
    metrics = Metrics(NewEngine(), Permits(1))
    metrics.request_ended("", 200, 0.0)
    text = asyncio.run(metrics.scrape(ready=True)).decode()
    return [family for family in text_string_to_metric_families(text) if family.name.startswith(PREFIX)]


def document() -> str:
    """Tables of every metric."""
    rows: dict[str, list[str]] = {section: [] for section in reversed(SECTIONS)}
    for family in families():
        name = family.name.removeprefix(PREFIX)
        section = next(section for section, starts in SECTIONS.items() if name.startswith(starts))
        suffix = "_total" if family.type == "counter" else ""
        cells = (f"`{name}{suffix}`", family.type, labels(family), family.documentation.replace("|", "\\|"))
        rows[section].append(f"| {' | '.join(cells)} |")
    lines: list[str] = []
    for section, entries in rows.items():
        lines += [f"## {section}", "", "| metric | type | labels | meaning |", "|---|---|---|---|", *entries, ""]
    return "\n".join(lines)


def labels(family: Metric) -> str:
    values: dict[str, dict[str, None]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            values.setdefault(label, {})[value] = None
    values.pop("le", None)
    return ", ".join(f"{label} ({', '.join(found)})" if label in CHOSEN else label for label, found in values.items())
