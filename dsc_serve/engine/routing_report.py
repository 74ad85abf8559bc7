"""What the engine reports of routing. Free of torch; travels between processes as it is."""

from __future__ import annotations

import msgspec


class LayerRouting(msgspec.Struct, array_like=True):
    """One layer. What has a default is sampled every few steps; the last three are of late (see `usage`)."""

    distinct: int  # different atoms of a step, summed over the watched steps
    grouped_tiles: int  # tiles of 16 tokens that were composed in grouped order
    arrival: float = 1.0  # ρ, the different atoms of a tile per pick, as tokens come
    grouped: float = 1.0  # and in grouped order
    signal: float = 0.0  # mean S of a token
    dead: float = 1.0  # share of atoms never picked
    top: float = 0.0  # share of picks that fall on the hottest 1 % of atoms
    entropy: float = 0.0  # relative to that of uniform picks


class RoutingReport(msgspec.Struct, array_like=True):
    """All layers since the start."""

    steps: int  # that were watched
    tokens: int  # computed in them
    bank_bytes: int  # read in them at least, each row of a step once
    router_bytes: int  # the same of the router
    layers: list[LayerRouting]
    composed: int = 0  # compositions, one for each step and layer
    grouped: int = 0  # of these, in grouped order
    rescored: int = 0  # router rows that the int8 screen could not rule out
    screened: int = 0  # tokens, once for each layer, that this was for
    picks_per_atom: float = 0.0  # that the usage of late is of
