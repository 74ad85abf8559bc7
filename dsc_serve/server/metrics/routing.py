"""What DSC layers picked, as families. Sums are over the steps that the engine watched: divide them by each other."""

from __future__ import annotations

from collections.abc import Callable

from dsc_serve.engine.routing_report import LayerRouting, RoutingReport
from dsc_serve.server.metrics.families import Families, counter, counters, gauge, gauges


def routing_families(report: RoutingReport) -> Families:
    yield counter("routing_steps", "Steps whose routing was watched.", report.steps)
    yield counter("routing_tokens", "Tokens computed in the watched steps.", report.tokens)
    yield counter("routing_bank_bytes", "Bytes of atoms read in the watched steps, each once.", report.bank_bytes)
    yield counter("routing_router_bytes", "Bytes of routers read in the watched steps.", report.router_bytes)
    yield counters(
        "routing_distinct_atoms",
        "Different atoms of a watched step, summed over these steps.",
        ("layer",),
        by_layer(report, lambda layer: layer.distinct),
    )
    yield counters(
        "routing_compositions",
        "Compositions, one for each layer and step, by path: rows gathered as tokens come, or tokens grouped first.",
        ("path",),
        {("gather",): report.composed - report.grouped, ("grouped",): report.grouped},
    )
    yield counter(
        "routing_screened_tokens",
        "Tokens that the certified int8 router screened, once for each layer.",
        report.screened,
    )
    yield counter("routing_rescored_rows", "Router rows scored again for screened tokens.", report.rescored)
    shares: dict[str, tuple[str, Callable[[LayerRouting], float]]] = {
        "signal": ("Mean signal S of a token.", lambda layer: layer.signal),
        "dead_share": ("Share of the atoms that nobody has picked of late.", lambda layer: layer.dead),
        "top_share": ("Share of the picks of late that fall on the hottest 1 % of atoms.", lambda layer: layer.top),
        "entropy": ("Entropy of the picks of late, relative to uniform ones.", lambda layer: layer.entropy),
    }
    for name, (text, share) in shares.items():
        yield gauges(f"routing_{name}", text, ("layer",), by_layer(report, share))
    yield gauge(
        "routing_usage_picks_per_atom",
        'Mean number of picks of an atom that "of late" means; shares of few picks say little.',
        report.picks_per_atom,
    )
    sharing = {(*key, "arrival"): rho for key, rho in by_layer(report, lambda layer: layer.arrival).items()}
    sharing |= {(*key, "grouped"): rho for key, rho in by_layer(report, lambda layer: layer.grouped).items()}
    yield gauges(
        "routing_sharing",
        "ρ: different atoms of a 16-token tile per pick, as tokens come and in grouped order; 1: nothing is shared.",
        ("layer", "order"),
        sharing,
    )


def by_layer(report: RoutingReport, value: Callable[[LayerRouting], float]) -> dict[tuple[str, ...], float]:
    return {(str(i),): value(layer) for i, layer in enumerate(report.layers)}
