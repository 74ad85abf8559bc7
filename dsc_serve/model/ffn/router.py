"""Routers of every FFN kind: the norm before one becomes part of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.quantised import QuantisedWeight, Weight
from dsc_kernels.weights import Router
from dsc_serve.model.placement import Placement
from dsc_serve.model.quantised_tensor import as_tensor
from dsc_serve.model.rounding import rounded


def folded_router(tensors: Mapping[str, Weight], place: Placement, biased: bool, norm_eps: float | None) -> Router:
    """The router of a layer's tensors; biased: whether it has a bias of its own. norm_eps: of its norm, None: none.

    A quantised one stays as it is where folding would change nothing: its norm multiplies by 1 only, and its rows are
    centred already. Else it is rounded again once it is folded.
    """
    stored = tensors["router.weight"]
    bias = as_tensor(tensors["router.bias"], torch.float64) if biased else None
    if norm_eps is None:
        return Router(place.weight("router", stored, torch.float32), wide(bias, place))
    scale, shift = (as_tensor(tensors[f"router_norm.{part}"], torch.float64) for part in ("weight", "bias"))
    folded, bias = reference.fold_router_norm(as_tensor(stored, torch.float64), bias, scale, shift)
    weight: Weight = folded.float()
    if isinstance(stored, QuantisedWeight):
        same = bool((scale == 1).all()) and are_centred(stored)
        weight = stored if same else rounded(folded.float(), 8)
    return Router(place.weight("router", weight, torch.float32), wide(bias, place), norm_eps)


def are_centred(router: QuantisedWeight) -> bool:
    """Whether rows [n, d] sum to no more than rounding centred ones to levels leaves.

    That is half a step for each number at most. Roundings mostly cancel: a sum of theirs has a variance of a twelfth of
    the steps' squares, and more than six deviations are none of theirs.
    """
    steps = router.scales.double().abs().repeat_interleave(router.group, dim=1)[:, : router.shape[1]]
    most = torch.minimum(steps.sum(1) / 2, 6 * (steps.square().sum(1) / 12).sqrt())
    return bool((as_tensor(router, torch.float64).sum(1).abs() <= most).all())


def wide(bias: Tensor | None, place: Placement) -> Tensor | None:
    return None if bias is None else bias.float().to(place.device)
