"""Which atoms each tenant of a bank picks, and how strongly: certificates, and who shares what with whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsc_serve.engine.adapter_jobs import LoadedAdapter
from dsc_serve.engine.routing_recorder import RecordedStep
from dsc_serve.engine.tenant_report import TenantFigures, TenantsReport
from dsc_serve.model.ffn.dsc import DscFfn

MOST = 256  # tenants that are told apart; of later ones nothing is kept
COMPARED = 64  # of these, with each other


@dataclass
class Seen:
    """Of one tenant."""

    name: str
    gamma: NDArray[np.float32]  # [layers]: max |γ|
    atoms: NDArray[np.bool_]  # [layers, M]: picked at least once
    strongest: NDArray[np.float32]  # [layers]: the largest S
    signal: float = 0.0  # summed over tokens and layers
    tokens: int = 0


class TenantWatch:
    """Takes in watched steps. indices: of the layers with a bank."""

    def __init__(self, layers: Sequence[DscFfn], indices: Sequence[int]) -> None:
        self._layers, self._indices, self._shape = layers, list(indices), layers[0].shape
        self._seen: dict[str, Seen] = {}

    def observe(self, step: RecordedStep) -> None:
        for i, request in enumerate(step.requests):
            adapter = request.adapter
            if adapter is None or not adapter.tuned:
                continue
            rows = np.flatnonzero(step.owners == i)
            own = self._of(adapter)
            if own is None or not len(rows):
                continue
            picks, signals = step.picks[:, rows].numpy(), step.signals[:, rows].numpy()
            for layer, picked in enumerate(picks):
                own.atoms[layer, picked.ravel()] = True
            own.strongest = np.maximum(own.strongest, signals.max(1))
            own.signal += float(signals.sum())
            own.tokens += len(rows)

    def _of(self, adapter: LoadedAdapter) -> Seen | None:
        own = self._seen.get(adapter.digest)
        if own is None and len(self._seen) < MOST:
            tunings = adapter.weights.tunings
            gamma = np.array([float(tunings[layer].gamma.abs().max()) for layer in self._indices], dtype=np.float32)
            atoms = np.zeros((len(self._layers), self._shape.atoms), dtype=np.bool_)
            own = self._seen[adapter.digest] = Seen(adapter.name, gamma, atoms, np.zeros_like(gamma))
        return own

    def report(self) -> TenantsReport:
        every = list(self._seen.items())
        atoms = np.array([own.atoms for _, own in every]) if every else np.zeros((0, 1, 1), dtype=np.bool_)
        alike, names = overlaps(atoms, COMPARED), [own.name for _, own in every]
        shared = np.sum([own.atoms for _, own in every], axis=0, dtype=np.int64) if every else np.zeros((0, 0))
        return TenantsReport(
            layers=self._indices,
            atoms=self._shape.atoms,
            atoms_per_token=self._shape.k,
            bank=self._layers[0].config.bank,
            shared=[int(count) for count in (shared > 1).sum(1)] if every else [0] * len(self._indices),
            tenants=[
                self._use(digest, own, [(names[j], float(alike[i, j])) for j in range(alike.shape[1]) if j != i])
                for i, (digest, own) in enumerate(every)
            ],
        )

    def _use(self, digest: str, own: Seen, compared: Sequence[tuple[str, float]]) -> TenantFigures:
        return TenantFigures(
            name=own.name,
            digest=digest,
            certificate=own.gamma.tolist(),
            bound=(np.tanh(own.strongest) * own.gamma).tolist(),
            tokens=own.tokens,
            signal=own.signal / max(1, own.tokens * len(self._layers)),
            distinct=own.atoms.sum(1).tolist(),
            overlap=dict(compared),
        )


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Shared atoms as a part of those of either, mean over layers; both [layers, M]."""
    return float(overlaps(np.stack([one, other]), 2)[0, 1])


def overlaps(every: NDArray[np.bool_], compared: int) -> NDArray[np.float32]:
    """The same of all with so many of the first of them [tenants, ≤ compared]; every [tenants, layers, M].

    As products of matrices: steps wait for it, and there may be hundreds.
    """
    seen = np.ascontiguousarray(every.transpose(1, 0, 2), dtype=np.float32)  # [layers, tenants, M]
    both = seen @ seen[:, :compared].transpose(0, 2, 1)
    sizes = seen.sum(2)
    either = sizes[:, :, None] + sizes[:, None, :compared] - both
    found: NDArray[np.float32] = (both / np.maximum(either, 1)).mean(0)
    return found
