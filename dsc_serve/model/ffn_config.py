"""What the FFN of a layer is, of each kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsc_serve.model.schema import Parts, Size, Strict


class DscConfig(Strict):
    """Dynamic Subspace Composition: a static MLP plus, per token, K of M rank-1 atoms.

    Algorithm 2 of the paper (and its reference script) has router_norm, router_bias and a γ per channel; Algorithm 1
    has no norm, no bias and a scalar γ.
    """

    kind: Literal["dsc"] = "dsc"
    num_atoms: Size
    atoms_per_token: Size
    static_size: Size
    tau: Annotated[float, Field(gt=0)] = 20.0
    eps: Annotated[float, Field(gt=0)] = 1e-6
    router_norm: bool = True
    router_bias: bool = True
    gamma: Literal["vector", "scalar"] = "vector"
    atoms: Literal["raw", "projected"] = "raw"  # whether the file holds raw rows or rows already projected to norm ≤ 1
    bank: Annotated[str, Field(max_length=64)] = ""  # what tenants of this bank name it by; "": it has none

    @model_validator(mode="after")
    def _enough_atoms(self) -> DscConfig:
        if self.atoms_per_token > self.num_atoms:
            raise ValueError(f"atoms_per_token is {self.atoms_per_token}, more than num_atoms, {self.num_atoms}")
        return self


class SharedExpertConfig(Strict):
    """An expert that every token runs through, its output times sigmoid(gate · x) where it is gated."""

    size: Size
    gated: bool = True


class MoeConfig(Strict):
    """Mixture of experts: each token runs through the k experts of the largest probability, and any shared one."""

    kind: Literal["moe"] = "moe"
    num_experts: Parts
    experts_per_token: Size
    expert_size: Size
    router_norm: bool = True
    # Whether the weights of the k sum to 1, as where the softmax is over the logits of those k alone
    normalize_weights: bool = False
    shared_expert: SharedExpertConfig | None = None
    # What makes scores of logits, a softmax over all or a sigmoid of each
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    # Whether something is added to the scores where experts are picked, and not in their weights
    choice_bias: bool = False
    groups: Size = 1  # into which experts are divided
    groups_used: Size = 1  # of them may be picked from, those of the best scores
    group_picks: Literal[1, 2] = 1  # a group's score is the sum of so many best experts' of it
    weight_scale: Annotated[float, Field(gt=0)] = 1.0  # what weights are multiplied by at the end

    @model_validator(mode="after")
    def _enough_experts(self) -> MoeConfig:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, more than num_experts, {self.num_experts}"
            )
        return self

    @model_validator(mode="after")
    def _groups(self) -> MoeConfig:
        if self.num_experts % self.groups:
            raise ValueError(f"num_experts is {self.num_experts}, which groups, {self.groups}, does not divide")
        size = self.num_experts // self.groups
        if self.groups_used > self.groups:
            raise ValueError(f"groups_used is {self.groups_used}, more than groups, {self.groups}")
        if self.group_picks > size or self.experts_per_token > self.groups_used * size:
            what = f"{self.groups_used} of {self.groups} parts have {self.groups_used * size} experts"
            raise ValueError(f"experts_per_token is {self.experts_per_token}, group_picks {self.group_picks}; {what}")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether experts are picked by a softmax over all alone."""
        return (self.scoring, self.choice_bias, self.groups, self.weight_scale) == ("softmax", False, 1, 1.0)


class MoloraConfig(Strict):
    """Mixture of LoRAs: a static MLP plus, per token, k of N low-rank adapters weighted by a softmax over the k."""

    kind: Literal["molora"] = "molora"
    num_adapters: Size
    adapters_per_token: Size
    rank: Size
    static_size: Size

    @model_validator(mode="after")
    def _enough_adapters(self) -> MoloraConfig:
        if self.adapters_per_token > self.num_adapters:
            raise ValueError(
                f"adapters_per_token is {self.adapters_per_token}, more than num_adapters, {self.num_adapters}"
            )
        return self


class DenseConfig(Strict):
    """A plain MLP, with a bias in each of its products if `bias`."""

    kind: Literal["dense"] = "dense"
    size: Size
    bias: bool = False


FfnConfig = Annotated[DscConfig | MoeConfig | MoloraConfig | DenseConfig, Field(discriminator="kind")]


def is_plain(ffn: FfnConfig) -> bool:
    """Whether an FFN is no mixture that picks its experts otherwise than by a softmax over all."""
    return not isinstance(ffn, MoeConfig) or ffn.is_plain
