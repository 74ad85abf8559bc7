"""Random restarts of atoms that no token picks (Dhariwal et al. 2020, "Jukebox", for the codes of a codebook)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_serve.model.initial import STD
from dsc_serve.train.optimiser import Optimiser


def revive(
    masters: Mapping[str, Tensor], prefix: str, picks: Tensor, routed: Tensor, optimiser: Optimiser, seed: int
) -> int:
    """Point every atom of one layer that was never picked at a random token of the batch; returns their number.

    picks int64 [M]; routed [B, d], what the router read. An atom's router row becomes a token's direction with the mean
    length of the rows in use, so that it is picked for such tokens; its own two rows are drawn anew, its moments
    forgotten. Does nothing where no atom was picked.
    """
    idle = (picks == 0).nonzero().flatten()
    used = (picks > 0).nonzero().flatten()
    if not len(idle) or not len(used):
        return 0
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(routed.shape[0], (len(idle),), generator=generator)
    router, bias = masters[f"{prefix}router.weight"], masters.get(f"{prefix}router.bias")
    directions = torch.nn.functional.normalize(routed[tokens.to(routed.device)].float(), dim=1)
    with torch.no_grad():
        router[idle] = directions * router[used].norm(dim=1).mean()
        if bias is not None:
            bias[idle] = bias[used].mean()
        for name in ("atoms_u", "atoms_v"):
            rows = masters[f"{prefix}{name}"]
            fresh = torch.randn(len(idle), rows.shape[1], generator=generator)
            rows[idle] = (STD * torch.nn.functional.normalize(fresh, dim=1)).to(rows)
    for name in ("router.weight", "router.bias", "atoms_u", "atoms_v"):
        if f"{prefix}{name}" in masters:
            optimiser.forget(f"{prefix}{name}", idle)
    return len(idle)
