"""A step's inputs, where the host writes them and where the model reads them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Held = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # ids, positions, blocks, offsets, tables, contexts


class Inputs:
    """A step's inputs, filled on the host in place and copied into buffers on the device that stay where they are.

    tokens: int64 [3 + groups, step tokens], rows of ids, positions, offsets and each group's blocks; tables: int64
    [groups, requests, width]; contexts: int64 [requests].
    """

    def __init__(self, step_tokens: int, requests: int, width: int, device: torch.device, groups: int = 1) -> None:
        on_host = device.type == "cpu"
        shapes = ((3 + groups, step_tokens), (groups, requests, width), (requests,))
        self.tokens, self.tables, self.contexts = (
            torch.zeros(shape, dtype=torch.int64, pin_memory=not on_host) for shape in shapes
        )
        # The same memory for the host to write: to numpy each view of a tensor is a new array.
        self.columns, self._tables, self.rows = tuple(self.tokens.numpy()), self.tables.numpy(), self.contexts.numpy()
        self._held: list[NDArray[np.int64] | None] = [None] * requests
        self._last: tuple[tuple[int, int], Held] | None = None  # steps of one size follow each other
        self._copies = None if on_host else [torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes]
        self._copied = None if on_host else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def hold(self, row: int, table: NDArray[np.int64]) -> None:
        """Let a row of the tables begin with a request's, which is a new array whenever it changes."""
        if self._held[row] is not table:
            self._tables[:, row, : table.shape[1]] = table
            self._held[row] = table

    def wait(self) -> None:
        """Until the last step's inputs have left the host's buffers, which may then be filled again."""
        if self._copied is not None:
            self._copied.synchronize()

    def pad(self, start: int, end: int, block: int) -> None:
        """Let rows and columns from `start` to `end` be sequences of one token, written to a block of nobody's."""
        self.tokens[:, start:end] = 0
        self.tokens[3:, start:end] = block
        self._held[start:end] = [None] * len(self._held[start:end])
        self.tables[:, start:end, 0] = block
        self.contexts[start:end] = 1

    def held(self, tokens: int, requests: int) -> Held:
        """Where the model computes: the first `tokens` of each column, then `requests` rows of tables and contexts."""
        if self._last is None or self._last[0] != (tokens, requests):
            columns, tables, contexts = self._copies or (self.tokens, self.tables, self.contexts)
            ids, positions, offsets = columns[:3, :tokens]
            self._last = (
                (tokens, requests),
                (ids, positions, columns[3:, :tokens], offsets, tables[:, :requests], contexts[:requests]),
            )
        return self._last[1]

    def on_device(self, tokens: int, requests: int) -> Held:
        """The same, after copying them there."""
        if self._copies is not None and self._copied is not None:
            columns, tables, contexts = self._copies
            for there, here in zip(columns, self.tokens, strict=True):  # what is in one piece needs no other memory
                there[:tokens].copy_(here[:tokens], non_blocking=True)
            for there, here in zip(tables, self.tables, strict=True):
                there[:requests].copy_(here[:requests], non_blocking=True)
            contexts[:requests].copy_(self.contexts[:requests], non_blocking=True)
            self._copied.record()
        return self.held(tokens, requests)
