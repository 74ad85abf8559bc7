"""The paper's budget solver: FFN sizes of every kind at equal total and active parameters."""

from __future__ import annotations

from dataclasses import dataclass

from dsc_serve.model.config import DenseConfig, DscConfig, MoeConfig, MoloraConfig

MIN_STATIC = 32  # the reference script's smallest static width, and its smallest expert
MAX_EXPERTS = 255


@dataclass(frozen=True)
class ParameterBudget:
    """A network's frame and its parameter targets: V vocabulary, T positions, L layers, d width; counts of parameters.

    The frame is the reference script's: learned positions, LayerNorm, four d × d matrices of attention a layer.
    """

    total: float
    active: float
    vocab_size: int
    context: int
    layers: int
    width: int
    tied: bool = True

    def __post_init__(self) -> None:
        if self.total < self.active:
            raise ValueError(f"total is {self.total:g} parameters, less than active, {self.active:g}")
        if self._per_layer(self.active) <= 0:
            raise ValueError(f"active is {self.active:g} parameters; the network without any FFN has {self.fixed:,}")

    @property
    def fixed(self) -> int:
        """Parameters outside the FFNs."""
        d, layers = self.width, self.layers
        embeddings = self.vocab_size * d * (1 if self.tied else 2) + self.context * d
        return embeddings + layers * (4 * d * d + 4 * d) + 2 * d

    def _per_layer(self, target: float) -> float:
        return (target - self.fixed) / self.layers

    def dense(self) -> DenseConfig:
        return DenseConfig(size=int(self._per_layer(self.total) // (2 * self.width)))

    def moe(self, k: int = 2) -> MoeConfig:
        """The number of experts whose total is nearest to the target, at the active parameters given."""
        d, total, active = self.width, self._per_layer(self.total), self._per_layer(self.active)
        best: tuple[float, int, int] | None = None
        for experts in range(k + 1, MAX_EXPERTS + 1):
            room = active - d * experts
            if room < 2 * d * MIN_STATIC * k:
                continue
            size = int(room // (2 * d * k))
            gap = abs(2 * experts * d * size + d * experts - total)
            if best is None or gap < best[0]:
                best = (gap, experts, size)
        if best is None:
            raise ValueError(f"no mixture of experts of {self.active:g} active parameters fits this network")
        return MoeConfig(num_experts=best[1], experts_per_token=k, expert_size=best[2])

    def dsc(self, k: int = 4) -> DscConfig:
        d, total, active = self.width, self._per_layer(self.total), self._per_layer(self.active)
        atoms = int((total - active + 2 * d * k) // (2 * d))
        static = int((active - d * atoms - 2 * d * k) // (2 * d))
        if static < MIN_STATIC:
            static = MIN_STATIC
            atoms = int((active - 2 * d * static - 2 * d * k) // d)
        if atoms < k:
            raise ValueError(f"{self.active:g} active parameters leave room for {atoms} atoms, fewer than K = {k}")
        return DscConfig(num_atoms=atoms, atoms_per_token=k, static_size=static)

    def molora(self, k: int = 2, rank: int = 4) -> MoloraConfig:
        d, total, active = self.width, self._per_layer(self.total), self._per_layer(self.active)
        adapters = int((total - active + 2 * d * rank * k) // (2 * d * rank))
        static = int((active - d * adapters - 2 * d * rank * k) // (2 * d))
        if adapters < k or static < 1:
            raise ValueError(f"no mixture of LoRAs of {self.active:g} active parameters fits this network")
        return MoloraConfig(num_adapters=adapters, adapters_per_token=k, rank=rank, static_size=static)
