"""Fewer experts for a mixture: those that say alike become one, merged in a subspace that they share.

After "Sub-MoE" (merging experts in a subspace): each layer's experts are clustered by the cosine similarity of what
they make of a calibration text, and a cluster's matrices, stacked, are decomposed together: the common factor stays,
and each expert's own is averaged by how often the expert is picked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.weights import Adapted
from dsc_serve.llm import LLM
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.decoder import TransformerLayer
from dsc_serve.model.ffn.moe import CHOICE_BIAS, MoeFfn, router_of
from dsc_serve.model.folder import refuse_taken, write_source
from dsc_serve.model.source import ModelSource, Stored
from dsc_serve.train.evaluation import Evaluation, evaluate
from dsc_serve.train.settings import TrainError

SAMPLE = 1024  # tokens of the calibration text whose outputs are compared
KEPT = 0.999  # of a cluster's squared singular values: what lies below is one expert's noise
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class MergedLayer:
    """A layer, its clusters of experts, and the loss with this layer alone merged."""

    layer: int
    clusters: list[list[int]]
    loss: float


@dataclass(frozen=True)
class Merged:
    """before, after: losses of each measured text; dropped: with the experts picked least dropped instead."""

    experts: tuple[int, int]
    layers: list[MergedLayer]
    before: dict[str, Evaluation]
    after: dict[str, Evaluation]
    dropped: dict[str, Evaluation]


class Listener(MoeFfn):
    """A layer's FFN that keeps the first inputs it is given."""

    def __init__(self, ffn: MoeFfn) -> None:
        self.ffn, self.layer, self.heard = ffn, ffn.layer, torch.empty(0)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        room = SAMPLE - len(self.heard)
        if room > 0:
            rows = x[:room].float()
            self.heard = rows.clone() if not len(self.heard) else torch.cat((self.heard, rows))
        return self.ffn(x, residual, adapted=adapted)


def merge_experts(model: Path, experts: int, calibration: str, texts: dict[str, str], out: Path) -> Merged:
    """Write to `out` the model with so many experts in each mixture, and measure both on `texts`.

    Raises TrainError for a model without mixtures or a tokenizer, mixtures whose experts are picked by groups, and a
    number of experts that is not below theirs or below what a token picks.
    """
    refuse_taken(out)
    source = open_source(model)
    mixtures = {i: kind for i, kind in enumerate(source.config.layers) if isinstance(kind.ffn, MoeConfig)}
    check(model, mixtures, experts)
    weights = source.weights()
    with LLM(str(model), dtype="float32") as llm:
        decoder = llm.engine.runner.model  # type: ignore[attr-defined]
        decoder.stack = None  # layers are called one by one, so that they can be listened to, and changed
        layers: list[TransformerLayer] = decoder.layers
        own = {i: layers[i].ffn for i in mixtures}
        listeners = {i: Listener(ffn) for i, ffn in own.items() if isinstance(ffn, MoeFfn)}
        for i, listener in listeners.items():
            layers[i].ffn = listener
        evaluate(llm, calibration)
        for i, ffn in own.items():
            layers[i].ffn = ffn
        measured = next(iter(texts))
        before = {name: evaluate(llm, text) for name, text in texts.items()}
        merged: dict[int, Tensors] = {}
        dropped: dict[int, Tensors] = {}
        found: list[MergedLayer] = []
        for i, kind in mixtures.items():
            tensors = {name.removeprefix(prefix(i)): weights[name] for name in weights if name.startswith(prefix(i))}
            clusters, merged[i], dropped[i] = merged_layer(kind, tensors, listeners[i].heard, experts)
            layers[i].ffn = ffn_of(kind, merged[i], experts)
            found.append(MergedLayer(i, clusters, evaluate(llm, texts[measured]).loss))
            layers[i].ffn = own[i]

        def with_all(changed: Mapping[int, Tensors]) -> dict[str, Evaluation]:
            for i, tensors in changed.items():
                layers[i].ffn = ffn_of(mixtures[i], tensors, experts)
            return {name: evaluate(llm, text) for name, text in texts.items()}

        fewer = with_all(dropped)
        after = with_all(merged)
    write_source(smaller(source, merged, experts), out)
    ffn_config = next(iter(mixtures.values())).ffn
    assert isinstance(ffn_config, MoeConfig)
    return Merged((ffn_config.num_experts, experts), found, before, after, fewer)


def prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp."


def check(model: Path, mixtures: Mapping[int, ModelConfig], experts: int) -> None:
    if not mixtures:
        raise TrainError(f"{model}: none of its FFNs is a mixture of experts; only those can be merged")
    for kind in mixtures.values():
        c = kind.ffn
        assert isinstance(c, MoeConfig)
        if c.groups > 1:
            raise TrainError(f"{model}: its experts are picked by {c.groups} groups; those of one group can be merged")
        if not c.experts_per_token <= experts < c.num_experts:
            raise TrainError(
                f"experts is {experts}; allowed: {c.experts_per_token}, what a token picks, to {c.num_experts - 1}"
            )


def merged_layer(
    config: ModelConfig, tensors: Tensors, heard: Tensor, experts: int
) -> tuple[list[list[int]], Tensors, Tensors]:
    """The clusters of a layer's experts, its tensors with each merged, and with those picked least dropped."""
    c = config.ffn
    assert isinstance(c, MoeConfig)
    outputs = [expert(config, tensors, e, heard) for e in range(c.num_experts)]
    shares = picked(config, tensors, heard)
    clusters = clustered(similarities(outputs), experts)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("experts.", "router."))}
    merged, dropped = dict(kept), dict(kept)
    parts = ("gate_proj", "up_proj", "down_proj") if config.mlp_gated else ("up_proj", "down_proj")
    for at, members in enumerate(clusters):
        weight = weights_of(shares[members])
        for part in parts:
            stacked = [tensors[f"experts.{e}.{part}.weight"] for e in members]
            merged[f"experts.{at}.{part}.weight"] = in_subspace(stacked, weight)
    best = sorted(shares.argsort(descending=True, stable=True)[:experts].tolist())
    for at, e in enumerate(best):
        for part in parts:
            dropped[f"experts.{at}.{part}.weight"] = tensors[f"experts.{e}.{part}.weight"]
    for name in (name for name in ("router.weight", CHOICE_BIAS) if name in tensors):
        rows = tensors[name].float()
        own = [torch.tensordot(weights_of(shares[members]), rows[members], dims=1) for members in clusters]
        merged[name] = torch.stack(own).to(tensors[name].dtype)
        dropped[name] = tensors[name][best]
    return clusters, merged, dropped


def expert(config: ModelConfig, tensors: Tensors, e: int, x: Tensor) -> Tensor:
    """What an expert makes of inputs x [T, d]."""
    up, gate, down = (tensors.get(f"experts.{e}.{part}.weight") for part in ("up_proj", "gate_proj", "down_proj"))
    assert up is not None and down is not None
    return reference.mlp(x, up.float(), None if gate is None else gate.float(), down.float(), config.hidden_act)


def picked(config: ModelConfig, tensors: Tensors, x: Tensor) -> Tensor:
    """How often each expert is picked for inputs x [T, d]: float32 [experts], which sum to 1."""
    c = config.ffn
    assert isinstance(c, MoeConfig)
    router, options = router_of(config, tensors, torch.device("cpu"))
    logits = reference.router_logits(x, router.weight, router.bias, router.norm_eps)
    _, choices = reference.pick_experts(logits, options, router.choice_bias)
    return torch.bincount(choices.flatten(), minlength=c.num_experts).float() / choices.numel()


def similarities(outputs: Sequence[Tensor]) -> Tensor:
    """The mean cosine of what each two experts make of the same inputs: float32 [experts, experts]."""
    directions = torch.stack([torch.nn.functional.normalize(own, dim=1) for own in outputs])
    return torch.einsum("atd,btd->ab", directions, directions) / max(directions.shape[1], 1)


def clustered(similar: Tensor, count: int) -> list[list[int]]:
    """So many clusters, the two that are most alike on average joined again and again; in order of their first."""
    clusters = [[i] for i in range(len(similar))]
    while len(clusters) > count:
        member = torch.zeros(len(clusters), len(similar), dtype=similar.dtype)
        for row, own in zip(member, clusters, strict=True):
            row[own] = 1 / len(own)
        mean = member @ similar @ member.T
        mean.fill_diagonal_(-torch.inf)
        first, second = sorted(divmod(int(mean.argmax()), len(clusters)))
        clusters[first] = sorted([*clusters[first], *clusters.pop(second)])
    return sorted(clusters)


def weights_of(shares: Tensor) -> Tensor:
    """The members' weights in a cluster, by how often they are picked; alike where none is."""
    total = shares.sum()
    return shares / total if total > 0 else torch.full_like(shares, 1 / len(shares))


def in_subspace(matrices: Sequence[Tensor], weight: Tensor) -> Tensor:
    """One matrix of a cluster's [n, m]: of [W₁ W₂ …] = U S [V₁ V₂ …]ᵀ the shared U S, cut to its strongest directions,
    times the V averaged by weight."""
    if len(matrices) == 1:
        return matrices[0]
    wide = torch.cat([matrix.float() for matrix in matrices], dim=1)
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    strength = s.square().cumsum(0)
    rank = int((strength < KEPT * strength[-1]).sum()) + 1
    own = torch.stack(vh[:rank].chunk(len(matrices), dim=1))
    merged: Tensor = (u[:, :rank] * s[:rank]) @ torch.tensordot(weight, own, dims=1)
    return merged.to(matrices[0].dtype)


def fewer_experts(config: ModelConfig, experts: int) -> ModelConfig:
    """The same with so many experts in each mixture."""

    def smaller_ffn(kind: ModelConfig) -> ModelConfig:
        ffn = kind.ffn
        return kind if not isinstance(ffn, MoeConfig) else kind.model_copy(update={"ffn": with_experts(ffn, experts)})

    kinds = [
        kind.model_copy(update={"ffn": with_experts(kind.ffn, experts)}) if isinstance(kind.ffn, MoeConfig) else kind
        for kind in config.layer_kinds
    ]
    return smaller_ffn(config).model_copy(update={"layer_kinds": kinds})


def with_experts(ffn: MoeConfig, experts: int) -> MoeConfig:
    return ffn.model_copy(update={"num_experts": experts})


def ffn_of(config: ModelConfig, tensors: Tensors, experts: int) -> MoeFfn:
    return MoeFfn(fewer_experts(config, experts), tensors, torch.float32, torch.device("cpu"))


def smaller(source: ModelSource, merged: Mapping[int, Tensors], experts: int) -> ModelSource:
    """The source of the merged model: nothing of the other layers is read yet."""

    def taken(tensor: Tensor) -> Callable[[], Tensor]:
        return partial(torch.clone, tensor)

    kept = {
        name: own for name, own in source.tensors.items() if not any(name.startswith(prefix(layer)) for layer in merged)
    }
    for layer, tensors in merged.items():
        for name, tensor in tensors.items():
            kept[prefix(layer) + name] = Stored(tuple(tensor.shape), tensor.dtype, taken(tensor))
    return replace(source, config=fewer_experts(source.config, experts), tensors=kept)
