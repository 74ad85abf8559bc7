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

    A quantised one stays as it is where its norm multiplies by 1 only; else it is rounded again once it is folded.
    """
    stored = tensors["router.weight"]
    bias = as_tensor(tensors["router.bias"], torch.float64) if biased else None
    if norm_eps is None:
        return Router(place.weight("router", stored, torch.float32), wide(bias, place))
    scale, shift = (as_tensor(tensors[f"router_norm.{part}"], torch.float64) for part in ("weight", "bias"))
    folded, bias = reference.fold_router_norm(as_tensor(stored, torch.float64), bias, scale, shift)
    weight: Weight = folded.float()
    if isinstance(stored, QuantisedWeight):
        weight = stored if bool((scale == 1).all()) else rounded(folded.float(), 8)
    return Router(place.weight("router", weight, torch.float32), wide(bias, place), norm_eps)


def wide(bias: Tensor | None, place: Placement) -> Tensor | None:
    return None if bias is None else bias.float().to(place.device)
