"""What the engine reports of routing. Free of torch; travels between processes as it is."""

from __future__ import annotations

import msgspec


class LayerRouting(msgspec.Struct, array_like=True):
    """One layer. distinct: different atoms of a step, summed over the watched steps. grouped_tiles: tiles of 16 tokens
    that were composed in grouped order.

    The rest is sampled every few steps. arrival, grouped: ρ, the different atoms of a 16-token tile per pick, as tokens
    come and in grouped order. signal: mean S of a token. Of late (see `usage`): dead, the share of atoms never picked;
    top, the share of picks that fall on the hottest 1 % of atoms; entropy, relative to that of uniform picks.
    """

    distinct: int
    grouped_tiles: int
    arrival: float = 1.0
    grouped: float = 1.0
    signal: float = 0.0
    dead: float = 1.0
    top: float = 0.0
    entropy: float = 0.0


class RoutingReport(msgspec.Struct, array_like=True):
    """All layers since the start. steps: watched ones; tokens: computed in them; bank_bytes and router_bytes: read in
    them at least, each row of a step once.

    composed: compositions, one for each step and layer; grouped: of these, in grouped order. rescored: router rows that
    the int8 screen could not rule out; screened: the tokens, once for each layer, that this was for. picks_per_atom:
    how many the usage of late is of.
    """

    steps: int
    tokens: int
    bank_bytes: int
    router_bytes: int
    layers: list[LayerRouting]
    composed: int = 0
    grouped: int = 0
    rescored: int = 0
    screened: int = 0
    picks_per_atom: float = 0.0
