"""What families of mixtures of experts share: the experts' matrices, stored one by one or all in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import LAYER, Tensors, Whole, renamed
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.source import Stored

NAMES = {r"\.mlp\.gate\.": ".mlp.router."}
STACKED = {".mlp.experts.gate_up_proj": "gate_proj+up_proj", ".mlp.experts.down_proj": "down_proj"}


def mixture(s: Settings, experts: tuple[str, ...], size: str, normalize: bool) -> Fields:
    """An FFN of experts that have no norm before their router; normalize: the picked weights sum to 1.

    experts: the fields that may give their number; of two the first goes before the other, as in transformers.
    """
    return {
        "kind": "moe",
        "num_experts": s.read_size(*experts),
        "experts_per_token": s.read_size("num_experts_per_tok"),
        "expert_size": s.read(size),
        "router_norm": False,
        "normalize_weights": normalize,
    }


def dense_layers(s: Settings) -> list[bool]:
    """Which layers have a plain MLP: those named, and those between the mixtures. Raises CheckpointError."""
    named, every = s.get("mlp_only_layers", default=[]), s.size("decoder_sparse_step", default=1)
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        s.refuse("mlp_only_layers", named, "a list of layers' numbers")
    chosen = set(named)
    return [layer in chosen or (layer + 1) % every > 0 for layer in range(s.layers())]


def expert_tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """The tensors of a family whose router is `mlp.gate`, with experts one by one or all in one tensor."""
    return unstacked(renamed(stored, NAMES), s, config, STACKED)


def unstacked(tensors: Mapping[str, Stored], s: Settings, config: ModelConfig, names: Mapping[str, str]) -> Tensors:
    """Tensors [experts, rows, columns] as one for each expert.

    names: by the end of a stored name, below `mlp.`, the projections whose rows it holds one after the other, joined by
    "+". Raises CheckpointError for other shapes than the configuration's.
    """
    result: Tensors = {}
    ends = [(re.compile(re.escape(end) + "$"), projections.split("+")) for end, projections in names.items()]
    for name, stored in tensors.items():
        place = LAYER.match(name)
        found = next((own for end, own in ends if place and end.search(name)), None)
        if place is None or found is None:
            result[name] = stored
        else:
            result |= experts_of(name, stored, found, place.group(), s, config.layers[layer_number(place, config, s)])
    return result


def layer_number(place: re.Match[str], config: ModelConfig, s: Settings) -> int:
    number = int(place.group(1))
    if number >= config.num_hidden_layers:
        raise CheckpointError(
            f"{s.path}: num_hidden_layers is {config.num_hidden_layers}, but a tensor's name begins {place.group()}"
        )
    return number


def experts_of(
    name: str, stored: Stored, projections: list[str], layer: str, s: Settings, config: ModelConfig
) -> Tensors:
    moe = config.ffn
    if not isinstance(moe, MoeConfig):
        raise CheckpointError(f"{s.path}: tensor {name} belongs to a mixture of experts, which layer {layer} is not")
    size, d = moe.expert_size, config.hidden_size
    one = (d, size) if projections == ["down_proj"] else (size, d)
    expected = (moe.num_experts, len(projections) * one[0], one[1])
    if stored.shape != expected:
        raise CheckpointError(f"{s.path}: tensor {name} has shape {list(stored.shape)}, expected {list(expected)}")
    whole = Whole(stored)
    return {
        f"{layer}mlp.experts.{e}.{projection}.weight": whole.part(
            one, partial(rows, expert=e, start=i * one[0], count=one[0])
        )
        for e in range(moe.num_experts)
        for i, projection in enumerate(projections)
    }


def rows(whole: Tensor, expert: int, start: int, count: int) -> Tensor:
    return whole[expert, start : start + count]
