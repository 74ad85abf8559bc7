"""What a step's tokens picked in each layer, as its requests report it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsc_serve.engine.output import RoutingSlice
from dsc_serve.engine.request import Request
from dsc_serve.model.ffn.picks import Picks
from dsc_serve.sampling_params import ALL_ATOMS


class StepPicks:
    """The picks of a step's tokens in the layers that pick.

    atoms [T, layers, K], coefficients [T, layers, K] and signal [T, layers].
    """

    def __init__(self, layers: Sequence[Picks]) -> None:
        atoms, coefficients, signal = (torch.stack(parts, dim=1).cpu().numpy() for parts in zip(*layers, strict=True))
        # The kernels' order is their own affair: the strongest first, equals by their number.
        order = np.lexsort((atoms, -coefficients), axis=-1)
        self._atoms = np.take_along_axis(atoms, order, axis=-1)
        self._coefficients = np.take_along_axis(coefficients, order, axis=-1)
        self._signal = signal

    def report(self, request: Request, start: int, count: int) -> RoutingSlice | None:
        """Of the request's tokens, `count` rows of the step from `start` on, what has not been reported before."""
        skipped = max(request.routed - request.num_computed, 0)
        if skipped >= count:  # computed again after a preemption
            return None
        rows = slice(start + skipped, start + count)
        k = None if request.params.routing == ALL_ATOMS else request.params.routing
        for one in (request, *request.siblings):
            one.routed = request.num_computed + count
        return RoutingSlice.packed(
            request.num_computed + skipped,
            self._atoms[rows, :, :k],
            self._coefficients[rows, :, :k],
            self._signal[rows],
        )
