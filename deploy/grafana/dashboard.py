"""Writes dsc-serve.json, the dashboard, with Grafana's own types: `python deploy/grafana/dashboard.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FILE = Path(__file__).parent / "dsc-serve.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WHERE = 'job=~"$job", instance=~"$instance"'
GENERATING = 'endpoint=~"/v1/(chat/)?completions"'


@dataclass(frozen=True)
class View:
    """A panel: its queries by legend. number: one number instead of curves. stacked: areas on each other."""

    title: str
    unit: str
    queries: dict[str, str]
    note: str = ""
    number: bool = False
    stacked: bool = False


def now(name: str) -> str:
    return f"dsc_serve_{name}{{{WHERE}}}"


def total(name: str, labels: str = "", by: str = "") -> str:
    """The rate of all servers together."""
    selected = f"dsc_serve_{name}{{{WHERE}{labels and f', {labels}'}}}"
    return f"sum by ({by}) (rate({selected}[$__rate_interval]))"


def per(name: str, other: str, by: str = "") -> str:
    return f"{total(name, by=by)} / scalar({total(other)})"


def mean(histogram: str) -> str:
    return per(f"{histogram}_sum", f"{histogram}_count")


def quantile(share: float, histogram: str, labels: str = "") -> str:
    return f"histogram_quantile({share}, {total(f'{histogram}_bucket', labels, by='le')})"


def quantiles(histogram: str, *shares: float, labels: str = "") -> dict[str, str]:
    return {f"p{100 * share:g}": quantile(share, histogram, labels) for share in shares}


def share_of_requests(status: str) -> str:
    asked, some = (total("requests_total", GENERATING + more) for more in ("", f', status=~"{status}"'))
    return f"({some} or 0 * {asked}) / {asked}"


ROWS: dict[str, list[View]] = {
    "Now": [
        View("Ready", "short", {"servers": f"sum ({now('ready')})"}, number=True),
        View("Requests", "reqps", {"": total("requests_total", GENERATING)}, number=True),
        View(
            "Failed", "percentunit", {"": share_of_requests("5..")}, "5xx, also as a stream's last event.", number=True
        ),
        View("Refused", "percentunit", {"": share_of_requests("429")}, "No place, or a key's limit.", number=True),
        View("Generated tokens per second", "short", {"": total("generated_tokens_total")}, number=True),
        View("First token, p99", "s", {"": quantile(0.99, "time_to_first_token_seconds")}, number=True),
    ],
    "What clients see": [
        View("Time to first token", "s", quantiles("time_to_first_token_seconds", 0.5, 0.95, 0.99)),
        View("Between tokens", "s", quantiles("inter_token_latency_seconds", 0.5, 0.95, 0.99)),
        View("Mean time per output token", "s", quantiles("time_per_output_token_seconds", 0.5, 0.95)),
        View("Whole requests", "s", quantiles("request_duration_seconds", 0.5, 0.95, labels=GENERATING)),
        View("Answers by status", "reqps", {"{{status}}": total("requests_total", GENERATING, "status")}, stacked=True),
        View(
            "Generations by end",
            "ops",
            {"{{finish_reason}}": total("generations_total", by="finish_reason")},
            stacked=True,
        ),
    ],
    "Load": [
        View(
            "Running and waiting",
            "short",
            {
                "running": f"sum ({now('requests_running')})",
                "waiting: {{reason}}": f"sum by (reason) ({now('requests_waiting_by_reason')})",
            },
            stacked=True,
        ),
        View("Places", "short", {"held": f"sum ({now('permits_held')})", "in all": f"sum ({now('permits')})"}),
        View(
            "Tokens per second",
            "short",
            {
                "prompt": total("prompt_tokens_total"),
                "found in the prefix cache": total("prefix_cached_tokens_total"),
                "generated": total("generated_tokens_total"),
            },
        ),
        View(
            "Tokens of a generation",
            "short",
            {
                f"{part}, p{100 * share:g}": quantile(share, f"generation_{part}_tokens")
                for part in ("prompt", "output")
                for share in (0.5, 0.95)
            },
        ),
        View(
            "Phases, mean", "s", {phase: mean(f"request_{phase}_seconds") for phase in ("queue", "prefill", "decode")}
        ),
        View("Prefix cache", "percentunit", {"hits": per("prefix_cached_tokens_total", "prefix_asked_tokens_total")}),
    ],
    "The engine": [
        View("Step", "s", {**quantiles("step_seconds", 0.5, 0.99), "mean": mean("step_seconds")}),
        View(
            "A step by part",
            "s",
            {"{{part}}": per("step_part_seconds_total", "engine_steps_total", "part")},
            stacked=True,
        ),
        View(
            "Drafts that prove right",
            "percentunit",
            {"{{source}}": per("draft_accepted_tokens_total", "draft_tokens_total", "source")},
            "By where they came from; nothing without speculation.",
        ),
        View(
            "Drafts",
            "short",
            {
                **{
                    f"{{{{source}}}}, {what}": total(f"draft_{name}tokens_total", by="source")
                    for what, name in (("computed", ""), ("right", "accepted_"))
                },
                "in a step, for a generation with any": mean("draft_width"),
            },
        ),
        View("A step computes", "short", {"tokens": mean("step_tokens"), "generations": mean("step_requests")}),
        View("KV blocks", "short", {"{{state}}": f"sum by (state) ({now('kv_blocks')})"}, stacked=True),
        View("Set back", "ops", {"preempted": total("preemptions_total"), "timed out": total("timeouts_total")}),
        View(
            "Signs of life",
            "short",
            {
                "restarts": f"sum ({now('engine_restarts_total')})",
                "seconds since the last word": f"max ({now('engine_heartbeat_age_seconds')})",
                "repaired invariants": f"sum ({now('invariant_repairs_total')})",
            },
        ),
    ],
    "Adapters": [
        View(
            "Tokens by adapter",
            "short",
            {"{{adapter}}": total("adapter_generated_tokens_total", by="adapter")},
            "Generated, a second; nothing without adapters.",
            stacked=True,
        ),
        View("Generations by adapter", "ops", {"{{adapter}}": total("adapter_generations_total", by="adapter")}),
        View("Adapters", "short", {"{{state}}": f"sum by (state) ({now('adapters')})"}, stacked=True),
        View(
            "Adapters in memory",
            "bytes",
            {"bytes": f"sum ({now('adapter_bytes')})", "budget": f"sum ({now('adapter_budget_bytes')})"},
        ),
        View(
            "Read and dropped",
            "ops",
            {what: total(f"adapter_{what}_total") for what in ("loads", "evictions", "errors")},
        ),
        View("Distinct adapters of a step", "short", {"mean, in steps with any": mean("step_adapters")}),
    ],
    "DSC": [
        View(
            "Distinct atoms per step",
            "short",
            {"layer {{layer}}": per("routing_distinct_atoms_total", "routing_steps_total", "layer")},
        ),
        View(
            "ρ",
            "short",
            {"{{order}}": f"avg by (order) ({now('routing_sharing')})"},
            "Different atoms of a 16-token tile per pick; 1: tokens share nothing.",
        ),
        View(
            "Bytes read per token",
            "bytes",
            {part: per(f"routing_{part}_bytes_total", "routing_tokens_total") for part in ("bank", "router")},
            stacked=True,
        ),
        View("Idle atoms", "percentunit", {"layer {{layer}}": f"avg by (layer) ({now('routing_dead_share')})"}),
        View("Entropy of picks", "percentunit", {"layer {{layer}}": f"avg by (layer) ({now('routing_entropy')})"}),
        View(
            "Picks of the top 1 %", "percentunit", {"layer {{layer}}": f"avg by (layer) ({now('routing_top_share')})"}
        ),
        View("Signal", "short", {"layer {{layer}}": f"avg by (layer) ({now('routing_signal')})"}),
        View("Compositions by path", "ops", {"{{path}}": total("routing_compositions_total", by="path")}, stacked=True),
        View(
            "Router rows scored again",
            "short",
            {"per token and layer": per("routing_rescored_rows_total", "routing_screened_tokens_total")},
            "By the certified int8 router; nothing where the router is exact.",
        ),
        View("Bank on the device", "bytes", {"{{device}}": f"sum by (device) ({now('bank_resident_bytes')})"}),
    ],
    "The API process": [
        View("Processor", "short", {"cores": f"sum (rate(process_cpu_seconds_total{{{WHERE}}}[$__rate_interval]))"}),
        View("Memory", "bytes", {"resident": f"sum (process_resident_memory_bytes{{{WHERE}}})"}),
        View("Scrapes", "s", {"longest": f"max (scrape_duration_seconds{{{WHERE}}})"}),
    ],
}


def panel(view: View) -> stat.Panel | timeseries.Panel:
    built = stat.Panel().span(4).height(4) if view.number else curves(view.stacked)
    built = built.title(view.title).unit(view.unit).datasource(SOURCE).description(view.note)
    for letter, (legend, query) in zip("ABCDEFGH", view.queries.items(), strict=False):
        target = prometheus.Dataquery().expr(query).ref_id(letter).legend_format(legend or "__auto")
        built = built.with_target(target)
    return built


def curves(stacked: bool) -> timeseries.Panel:
    stacking = common.StackingConfig().mode(StackingMode.NORMAL if stacked else StackingMode.NONE)
    legend = common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)
    return (
        timeseries.Panel()
        .span(8)
        .height(8)
        .min(0)
        .fill_opacity(40 if stacked else 5)
        .stacking(stacking)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .legend(legend.placement(LegendPlacement.BOTTOM))
    )


def label_variable(name: str, query: str) -> QueryVariable:
    variable = QueryVariable(name).datasource(SOURCE).query(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return variable.include_all(True).multi(True).all_value(".*")


def dashboard() -> str:
    """As JSON."""
    board = (
        Dashboard("dsc-serve")
        .uid("dsc-serve")
        .tags(["dsc-serve"])
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
        .with_variable(label_variable("job", "label_values(dsc_serve_ready, job)"))
        .with_variable(label_variable("instance", 'label_values(dsc_serve_ready{job=~"$job"}, instance)'))
    )
    for title, views in ROWS.items():
        board = board.with_row(Row(title))
        for view in views:
            board = board.with_panel(panel(view))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(dashboard())
