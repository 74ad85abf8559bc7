"""Tokens that a device has drawn and the host has not read: the next step takes them from here."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenFeed:
    """In the inputs of a step `first` + i stands for the token that row i of the step launched before it drew.

    first: the size of the vocabulary. rows: most tokens that a step draws. drawn: int64 [rows], what the last step
    drew; a captured step writes it by itself.
    """

    def __init__(self, first: int, rows: int, device: torch.device) -> None:
        self.first = first
        self._tokens = torch.arange(first + rows, device=device)  # each token itself, then what was drawn
        self.drawn = self._tokens[first:]
        # One is written to before the other is read.
        self._readings = TokenReading(rows, device), TokenReading(rows, device)

    def resolve(self, ids: Tensor) -> Tensor:
        """A step's token ids [T], known ones and such as stand for others, as tokens int64 [T]."""
        return self._tokens.index_select(0, ids)

    def keep(self, tokens: Tensor, placed: bool = False) -> TokenReading:
        """What a step has drawn, int64 [R], is what the next one is fed with; the host can read it meanwhile.

        placed: whether it lies in `drawn` already.
        """
        if not placed:
            self.drawn[: len(tokens)] = tokens
        self._readings = self._readings[::-1]
        self._readings[0].fetch(tokens)
        return self._readings[0]


class TokenReading:
    """A copy of a step's tokens on its way to the host, which no later step holds up."""

    def __init__(self, rows: int, device: torch.device) -> None:
        pinned = device.type != "cpu"
        self._copy, self._count = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned), 0
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fetch(self, tokens: Tensor) -> None:
        self._count = len(tokens)
        self._copy[: self._count].copy_(tokens, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def tokens(self) -> list[int]:
        """Waits for the step that drew them, and for none after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return [int(token) for token in self._copy[: self._count].tolist()]
