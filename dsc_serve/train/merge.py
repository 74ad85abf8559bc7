"""Fewer experts for a mixture: those that say alike become one, merged in a subspace that they share.

After "Sub-MoE" (merging experts in a subspace): each layer's experts are clustered by the cosine similarity of what
they make of a calibration text, and a cluster's matrices, stacked, are decomposed together: the common factor stays,
and each expert's own is averaged by how often the expert is picked. Ours besides: hidden units are brought into one
order first, and the second matrix and the router are then fitted to what the members gave of the calibration text.
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
from dsc_serve.model.ffn.moe import CHOICE_BIAS, MoeFfn, router_of
from dsc_serve.model.folder import refuse_taken, write_source
from dsc_serve.model.placement import Placement
from dsc_serve.model.quantised_tensor import as_tensor
from dsc_serve.model.source import ModelSource, Stored
from dsc_serve.model.transformer_layer import TransformerLayer
from dsc_serve.train.evaluation import Evaluation, evaluate
from dsc_serve.train.settings import TrainError

SAMPLE = 4096  # tokens of the calibration text whose outputs are compared
KEPT = 0.999  # of a cluster's squared singular values: what lies below is one expert's noise
RIDGE = 1e-2  # of the mean of a regression's squares
DOWN = "down_proj.weight"
PLACE = Placement(torch.float32, torch.device("cpu"))
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class MergedLayer:
    """A layer, its clusters of experts, and the loss with this layer alone merged."""

    layer: int
    clusters: list[list[int]]
    loss: float


@dataclass(frozen=True)
class MergedExperts:
    """What was merged, and what it cost."""

    experts: tuple[int, int]
    layers: list[MergedLayer]
    before: dict[str, Evaluation]  # losses of each measured text
    after: dict[str, Evaluation]  # likewise
    dropped: dict[str, Evaluation]  # with the experts picked least dropped instead


class HeardFfn(MoeFfn):
    """A layer's FFN that keeps the first inputs it is given."""

    def __init__(self, ffn: MoeFfn) -> None:
        self.ffn, self.layer, self.heard = ffn, ffn.layer, torch.empty(0)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        room = SAMPLE - len(self.heard)
        if room > 0:
            rows = x[:room].float()
            self.heard = rows.clone() if not len(self.heard) else torch.cat((self.heard, rows))
        return self.ffn(x, residual, adapted=adapted)


def merge_experts(model: Path, experts: int, calibration: str, texts: dict[str, str], out: Path) -> MergedExperts:
    """Write to `out` the model with so many experts in each mixture, and measure both on `texts`.

    Raises TrainError for a model without mixtures or a tokenizer, mixtures whose experts are picked by groups, and a
    number of experts that is not below theirs or below what a token picks.
    """
    refuse_taken(out)
    source = open_source(model)
    mixtures = {i: kind for i, kind in enumerate(source.config.layers) if isinstance(kind.ffn, MoeConfig)}
    check(model, mixtures, experts)
    weights = source.weights()
    with LLM(str(model), dtype="float32", weights="bfloat16") as llm:
        decoder = llm.engine.runner.model  # type: ignore[attr-defined]
        decoder.stack = None  # layers are called one by one, so that they can be listened to, and changed
        layers: list[TransformerLayer] = decoder.layers
        own = {i: layers[i].ffn for i in mixtures}
        listeners = {i: HeardFfn(ffn) for i, ffn in own.items() if isinstance(ffn, MoeFfn)}
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
    return MergedExperts((ffn_config.num_experts, experts), found, before, after, fewer)


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
    outputs = torch.stack([expert(config, tensors, e, heard) for e in range(c.num_experts)], dim=1)
    logits, weights = routed(config, tensors, heard)
    shares = (weights > 0).float().mean(0)
    clusters = clustered(similarities(list(outputs.unbind(1))), experts)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("experts.", "router."))}
    merged, dropped = dict(kept), dict(kept)
    for at, members in enumerate(clusters):
        own = merged_expert(config, tensors, members, weights_of(shares[members]))
        if len(members) > 1:
            fit_output(config, own, heard, outputs[:, members], weights[:, members])
        merged |= {f"experts.{at}.{part}": tensor for part, tensor in own.items()}
    best = sorted(shares.argsort(descending=True, stable=True)[:experts].tolist())
    for at, e in enumerate(best):
        dropped |= {f"experts.{at}.{part}": tensor for part, tensor in matrices_of(tensors, e).items()}
    for name in (name for name in ("router.weight", CHOICE_BIAS) if name in tensors):
        rows = tensors[name].float()
        means = [torch.tensordot(weights_of(shares[members]), rows[members], dims=1) for members in clusters]
        merged[name] = torch.stack(means).to(tensors[name].dtype)
        dropped[name] = tensors[name][best]
    fit_router(config, tensors, merged, heard, logits, clusters)
    return clusters, merged, dropped


def matrices_of(tensors: Tensors, e: int) -> Tensors:
    """An expert's matrices, by their names below it."""
    at = f"experts.{e}."
    return {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}


def inner(config: ModelConfig, own: Tensors, x: Tensor) -> Tensor:
    """What an expert's second product is of, for inputs x [T, d]."""
    act, up = reference.ACTIVATIONS[config.hidden_act], x @ own["up_proj.weight"].float().T
    return act(x @ own["gate_proj.weight"].float().T) * up if config.mlp_gated else act(up)


def expert(config: ModelConfig, tensors: Tensors, e: int, x: Tensor) -> Tensor:
    """What an expert makes of inputs x [T, d]."""
    own = matrices_of(tensors, e)
    return inner(config, own, x) @ own["down_proj.weight"].float().T


def routed(config: ModelConfig, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """The router's logits for inputs x [T, d], and the weights of the experts that are picked, 0 of the others."""
    router, options = router_of(config, tensors, PLACE)
    logits = reference.router_logits(x, as_tensor(router.weight, torch.float32), router.bias, router.norm_eps)
    weights, choices = reference.pick_experts(logits, options, router.choice_bias)
    return logits, torch.zeros_like(logits).scatter(1, choices, weights)


def merged_expert(config: ModelConfig, tensors: Tensors, members: Sequence[int], weight: Tensor) -> Tensors:
    """A cluster's matrices: hidden units are brought into the order of the member picked most, then merged."""
    own = [matrices_of(tensors, e) for e in members]
    first = own[int(weight.argmax())]
    ordered = [one if one is first else in_order(first, one) for one in own]
    return {part: in_subspace([one[part] for one in ordered], weight) for part in first}


def in_order(first: Tensors, other: Tensors) -> Tensors:
    """An expert with its hidden units in the order of those of another that are most like them."""
    directions = [
        torch.cat([torch.nn.functional.normalize(units(own, part), dim=1) for part in own], dim=1)
        for own in (first, other)
    ]
    similar = directions[0] @ directions[1].T
    order, taken = [-1] * len(similar), [False] * len(similar)
    for pair in similar.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(pair, len(similar))
        if order[row] < 0 and not taken[column]:
            order[row], taken[column] = column, True
    return {part: tensor[:, order] if part == DOWN else tensor[order] for part, tensor in other.items()}


def units(own: Tensors, part: str) -> Tensor:
    """A matrix with a row for each hidden unit."""
    return own[part].float().T if part == DOWN else own[part].float()


def fit_output(config: ModelConfig, own: Tensors, x: Tensor, outputs: Tensor, weights: Tensor) -> None:
    """In place: the second matrix of a merged expert gives what the members gave of x [T, d], outputs [T, members, d],
    by their weights [T, members]: ridge regression towards what it is."""
    total = weights.sum(1, keepdim=True)
    target = torch.einsum("te,ted->td", weights, outputs)  # of the merged expert times the members' weight
    hidden = inner(config, own, x) * total
    down = own[DOWN].float()
    own[DOWN] = (down + ridge(hidden, target - hidden @ down.T).T).to(own[DOWN].dtype)


def fit_router(
    config: ModelConfig, tensors: Tensors, merged: Tensors, x: Tensor, logits: Tensor, clusters: Sequence[list[int]]
) -> None:
    """In place: a merged expert's row gives the logarithm of what its members' logits [T, experts] stand for together,
    or where each is scored by itself the largest of them: ridge regression towards their mean."""
    if "router_norm.weight" in tensors:
        norm = tensors["router_norm.weight"].float(), tensors["router_norm.bias"].float()
        x = torch.nn.functional.layer_norm(x, x.shape[1:], *norm, config.norm_eps)
    c = config.ffn
    assert isinstance(c, MoeConfig)
    alone = c.scoring == "sigmoid"
    target = torch.stack(
        [logits[:, members].amax(1) if alone else logits[:, members].logsumexp(1) for members in clusters], dim=1
    )
    rows = merged["router.weight"].float()
    merged["router.weight"] = (rows + ridge(x, target - x @ rows.T).T).to(merged["router.weight"].dtype)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The matrix [n, m] whose product with x [T, n] is nearest to y [T, m], held small."""
    wide = x.double()
    gram = wide.T @ wide
    held = RIDGE * gram.diagonal().mean() + 1e-12
    found: Tensor = torch.linalg.solve(gram + held * torch.eye(len(gram), dtype=gram.dtype), wide.T @ y.double())
    return found.float()


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
    return MoeFfn(fewer_experts(config, experts), tensors, PLACE)


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
