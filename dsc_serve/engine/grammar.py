"""Structured outputs in a step: tokens that may not follow are taken out of the logits before sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_serve.engine.request import Request
from dsc_serve.engine.sampler import to_device
from dsc_serve.text.grammar import GrammarStuckError


def constrain(logits: Tensor, requests: Sequence[Request]) -> dict[str, str]:
    """Set the logits [R, V] of tokens that may not follow to −∞, in place.

    Returns why a request cannot go on, by id, for those that cannot.
    """
    stuck = {}
    for i, request in enumerate(requests):
        if request.constraint is None:
            continue
        try:
            allowed = request.constraint.allowed(request.tokens, request.prompt_size)
        except GrammarStuckError as error:
            stuck[request.id] = str(error)
            continue
        logits[i].masked_fill_(to_device(torch.from_numpy(~allowed), logits.device), -torch.inf)
    return stuck
