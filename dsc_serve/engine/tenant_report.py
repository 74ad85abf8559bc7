"""What the engine reports of tenants of a bank. Free of torch; travels between processes as it is."""

from __future__ import annotations

import msgspec


class TenantFigures(msgspec.Struct, kw_only=True):
    """One tenant, since the engine began. Of a composition with one it is the composition's."""

    name: str
    digest: str
    certificate: list[float]  # by layer max |γ|: no token's dynamic part can have a larger operator norm
    bound: list[float]  # by layer tanh(S) max |γ| of the largest signal S seen: what none of the watched did exceed
    tokens: int  # watched, one in several steps is
    signal: float  # mean S of a token and layer
    distinct: list[int]  # different atoms that its watched tokens picked, by layer
    overlap: dict[str, float]  # with others: shared atoms / atoms of either, mean over layers


class TenantsReport(msgspec.Struct, kw_only=True):
    """All that were watched, the first first. Without a bank there are no layers."""

    layers: list[int] = []  # those with a bank
    atoms: int = 0  # of each
    atoms_per_token: int = 0
    bank: str = ""  # its name
    shared: list[int] = []  # by layer, atoms that two tenants or more have picked
    tenants: list[TenantFigures] = []
