"""Metrics for Prometheus: counted at the HTTP edge, and read from the engine at the moment of the scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dsc_serve.engine.routing_report import RoutingReport
from dsc_serve.server.errors import CLIENT_CLOSED
from dsc_serve.worker.messages import Stats

# A small model answers within milliseconds: the edges begin where it does.
FIRST_TOKEN_EDGES_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
INTER_TOKEN_EDGES_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5,
)  # fmt: skip
DURATION_EDGES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class EngineCollector(Collector):
    """The engine's own state. `stats` is set just before a scrape reads it; None leaves the engine's series out."""

    def __init__(self) -> None:
        self.stats: Stats | None = None
        self.alive = False
        self.restarts = 0
        self.in_flight = 0
        self.followed = 0

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        yield GaugeMetricFamily("dsc_serve_engine_up", "1 while the engine process is alive.", self.alive)
        yield CounterMetricFamily("dsc_serve_engine_restarts", "Times the engine was started again.", self.restarts)
        yield GaugeMetricFamily("dsc_serve_permits_held", "Generations that the server has let in.", self.in_flight)
        yield GaugeMetricFamily("dsc_serve_requests_followed", "Requests that wait for news.", self.followed)
        stats = self.stats
        if stats is None:
            return
        yield GaugeMetricFamily("dsc_serve_requests_running", "Requests that the engine computes.", stats.running)
        yield GaugeMetricFamily("dsc_serve_requests_waiting", "Requests in the engine's queue.", stats.waiting)
        blocks = GaugeMetricFamily("dsc_serve_kv_blocks", "Blocks of the KV pool.", labels=["state"])
        blocks.add_metric(["free"], stats.blocks_free)
        blocks.add_metric(["cached"], stats.blocks_cached)
        blocks.add_metric(["used"], stats.blocks_total - stats.blocks_free - stats.blocks_cached)
        yield blocks
        yield CounterMetricFamily("dsc_serve_engine_steps", "Steps of the engine.", stats.steps)
        yield CounterMetricFamily("dsc_serve_preemptions", "Requests put back into the queue.", stats.preemptions)
        yield CounterMetricFamily("dsc_serve_timeouts", "Requests that ran out of their time.", stats.timeouts)
        yield CounterMetricFamily(
            "dsc_serve_prefix_asked_tokens", "Prompt tokens of requests that began to compute.", stats.prompt_tokens
        )
        yield CounterMetricFamily(
            "dsc_serve_prefix_cached_tokens", "Of these, found in the prefix cache.", stats.cached_tokens
        )
        bank = GaugeMetricFamily("dsc_serve_bank_resident_bytes", "Atoms that lie on the device.", labels=["device"])
        bank.add_metric([stats.device], stats.bank_bytes)
        yield bank
        yield CounterMetricFamily(
            "dsc_serve_invariant_repairs", "Broken invariants that the engine repaired.", stats.invariant_repairs
        )
        if stats.routing is not None:
            yield from routing_families(stats.routing)


def routing_families(report: RoutingReport) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
    """What DSC layers picked. Sums are over the steps that the engine watched: divide them by each other."""
    for name, text, value in (
        ("steps", "Steps whose routing was watched.", report.steps),
        ("tokens", "Tokens computed in these steps.", report.tokens),
        ("bank_bytes", "Bytes of picked atoms read in these steps, each atom of a step once.", report.bank_bytes),
        ("router_bytes", "Bytes of router weights read in these steps.", report.router_bytes),
    ):
        yield CounterMetricFamily(f"dsc_serve_routing_{name}", text, value)
    for name, text, values in (
        ("distinct_atoms", "Different atoms of each of these steps.", [r.distinct for r in report.layers]),
        ("grouped_tiles", "Tiles of 16 tokens composed in grouped order.", [r.grouped_tiles for r in report.layers]),
    ):
        counter = CounterMetricFamily(f"dsc_serve_routing_{name}", text, labels=["layer"])
        for layer, count in enumerate(values):
            counter.add_metric([str(layer)], count)
        yield counter
    for name, text, shares in (
        ("signal", "Mean signal S of a token.", [r.signal for r in report.layers]),
        ("dead_share", "Share of the atoms that no token has picked.", [r.dead for r in report.layers]),
        ("top_share", "Share of the picks that fall on the hottest 1 % of atoms.", [r.top for r in report.layers]),
        ("entropy", "Entropy of the picks relative to uniform ones.", [r.entropy for r in report.layers]),
    ):
        gauge = GaugeMetricFamily(f"dsc_serve_routing_{name}", text, labels=["layer"])
        for layer, share in enumerate(shares):
            gauge.add_metric([str(layer)], share)
        yield gauge
    sharing = GaugeMetricFamily(
        "dsc_serve_routing_sharing", "Different atoms of a 16-token tile per pick.", labels=["layer", "order"]
    )
    for layer, own in enumerate(report.layers):
        sharing.add_metric([str(layer), "arrival"], own.arrival)
        sharing.add_metric([str(layer), "grouped"], own.grouped)
    yield sharing


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineCollector()
        self.registry.register(self.engine)
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "dsc_serve_requests",
            f"HTTP requests by what the client got; {CLIENT_CLOSED}: it left before the end.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "dsc_serve_request_duration_seconds",
            "From an HTTP request's arrival to the end of its answer.",
            ["endpoint"],
            buckets=DURATION_EDGES_S,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "dsc_serve_time_to_first_token_seconds",
            "From an HTTP request's arrival to the first token of each of its generations.",
            buckets=FIRST_TOKEN_EDGES_S,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "dsc_serve_inter_token_latency_seconds",
            "Between the tokens of one generation.",
            buckets=INTER_TOKEN_EDGES_S,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "dsc_serve_prompt_tokens", "Prompt tokens of admitted requests.", registry=self.registry
        )
        self.generated_tokens = Counter(
            "dsc_serve_generated_tokens", "Tokens that the engine generated.", registry=self.registry
        )

    def render(self, stats: Stats | None, alive: bool, restarts: int, in_flight: int, followed: int) -> bytes:
        """The text of a scrape."""
        self.engine.stats, self.engine.alive = stats, alive
        self.engine.restarts, self.engine.in_flight, self.engine.followed = restarts, in_flight, followed
        return generate_latest(self.registry)
