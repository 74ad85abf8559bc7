"""How often the members of each layer's bank are picked, and how strong the signal is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_serve.train.ffn import FfnTrace


class TrainingUsage:
    """Counts over any number of forward passes. picks: per layer int64 [M]; empty where the FFN picks nothing."""

    def __init__(self, picks: Sequence[Tensor] = ()) -> None:
        self.picks = list(picks)
        self._signal: list[float] = []
        self._weight = 0.0

    def add(self, layers: Sequence[FfnTrace], weight: float = 1.0) -> None:
        """Take in one pass; weight: its part of the mean signal."""
        picks = [trace.picks for trace in layers if trace.picks is not None]
        self.picks = [old + new for old, new in zip(self.picks, picks, strict=True)] if self.picks else picks
        signal = [weight * float(trace.signal) for trace in layers if trace.signal is not None]
        self._signal = [a + b for a, b in zip(self._signal, signal, strict=True)] if self._signal else signal
        self._weight += weight

    @property
    def dead(self) -> list[int]:
        """Per layer, the members that no token picked."""
        return [int((layer == 0).sum()) for layer in self.picks]

    @property
    def used(self) -> list[float]:
        """Per layer, the share of the bank that some token picked."""
        return [round(float((layer > 0).double().mean()), 4) for layer in self.picks]

    @property
    def signal(self) -> list[float]:
        """Per layer, the mean signal S of a token; empty where there is none."""
        return [round(total / self._weight, 4) for total in self._signal]

    @property
    def live(self) -> list[Tensor]:
        """Per layer, the indices of the members that some token picked, ascending."""
        return [torch.nonzero(layer).flatten() for layer in self.picks]
