"""The tensors of the MLP that every FFN kind contains: plain or gated, in its own or an expert's place."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_kernels.quantised import Weight
from dsc_kernels.weights import MlpWeights
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.placement import Placement


def mlp_shapes(config: ModelConfig, size: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    d = config.hidden_size
    names = ("up_proj", "gate_proj") if config.mlp_gated else ("up_proj",)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": (size, d) for name in names}
    shapes[f"{prefix}down_proj.weight"] = (d, size)
    return shapes


def mlp_weights(
    config: ModelConfig, tensors: Mapping[str, Weight], place: Placement, prefix: str = "", biased: bool = False
) -> MlpWeights:
    """The tensors of an MLP below `prefix`; biased: with a bias in each of its products."""
    names = ("up_proj", "gate_proj", "down_proj") if config.mlp_gated else ("up_proj", "down_proj")
    weights = {name: place.weight("mlp", tensors[f"{prefix}{name}.weight"]) for name in names}
    biases = {name: place.tensor(tensors[f"{prefix}{name}.bias"]) for name in names} if biased else {}
    return MlpWeights(
        weights["up_proj"],
        weights.get("gate_proj"),
        weights["down_proj"],
        biases.get("up_proj"),
        biases.get("gate_proj"),
        biases.get("down_proj"),
    )


def expert_weights(
    config: ModelConfig, tensors: Mapping[str, Weight], place: Placement, count: int
) -> list[MlpWeights]:
    """Those of a mixture's experts; each of their matrices has one form in all of them."""

    def all_of(name: str) -> list[Weight]:
        return place.weights("experts", [tensors[f"experts.{e}.{name}.weight"] for e in range(count)])

    gates: list[Weight] | list[None] = all_of("gate_proj") if config.mlp_gated else [None] * count
    return [MlpWeights(*one) for one in zip(all_of("up_proj"), gates, all_of("down_proj"), strict=True)]
