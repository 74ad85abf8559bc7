"""A step's inputs, where the host writes them and where the model reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsc_kernels.weights import ChunkPlace
from dsc_serve.engine.device_inputs import CHUNKS, DeviceInputs, Held

SPARE: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)  # stands for the table of a sequence of nobody's


class Inputs:
    """A step's inputs, filled on the host in place; where the model is on a device, they are copied there.

    tokens: int64 [3 + groups, step tokens], rows of ids, positions, offsets and each group's blocks; tables: int64
    [groups, requests, width]; contexts: int64 [requests]. Captured steps are told their chunks: int64 [CHUNKS, 4].
    """

    def __init__(self, step_tokens: int, requests: int, width: int, device: torch.device, groups: int = 1) -> None:
        shapes = ((3 + groups, step_tokens), (groups, requests, width), (requests,))
        self.tokens, self.tables, self.contexts = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
        # The same memory for the host to write: to numpy each view of a tensor is a new array.
        self.columns, self._tables, self.rows = tuple(self.tokens.numpy()), self.tables.numpy(), self.contexts.numpy()
        self._chunk_places = torch.zeros(CHUNKS, 4, dtype=torch.int64)
        self._held: list[NDArray[np.int64] | None] = [None] * requests
        self._changed: set[int] = set()  # rows of the tables that have not been copied
        self._last: tuple[tuple[int, int], Held] | None = None  # steps of one size follow each other
        self._device: DeviceInputs | None = None
        if device.type != "cpu":
            self._device = DeviceInputs(3 + groups, step_tokens, groups, requests, width, device)

    def hold(self, row: int, table: NDArray[np.int64]) -> None:
        """Let a row of the tables begin with a request's, which is a new array whenever it changes."""
        if self._held[row] is not table:
            self._tables[:, row, : table.shape[1]] = table
            self._held[row] = table
            self._changed.add(row)

    def wait(self) -> None:
        """Until the last step's inputs have left the host's buffers, which may then be filled again."""
        if self._device is not None:
            self._device.wait()

    def pad(self, start: int, end: int, block: int) -> None:
        """Let rows and columns from `start` to `end` be sequences of one token, written to a block of nobody's."""
        self.pad_columns(start, end, block)
        self.contexts[start:end] = 1
        for row in range(start, min(end, len(self._held))):
            if self._held[row] is not SPARE:
                self.spare(row, block)

    def pad_columns(self, start: int, end: int, block: int) -> None:
        """Let columns be tokens of nobody's."""
        self.tokens[:, start:end] = 0
        self.tokens[3:, start:end] = block

    def place(self, chunks: Sequence[ChunkPlace]) -> None:
        """Let these, at most CHUNKS, be the chunks whose places are told."""
        chunk_places = self._chunk_places.numpy()
        chunk_places[:] = 0
        if chunks:
            chunk_places[: len(chunks)] = chunks

    def spare(self, row: int, block: int) -> None:
        """Let a row of the tables be of nothing but a block of nobody's."""
        self._tables[:, row] = block
        self._held[row] = SPARE
        self._changed.add(row)

    def held(self, tokens: int, requests: int) -> Held:
        """Where the model computes: the first `tokens` of each column, then `requests` rows of tables and contexts."""
        if self._last is None or self._last[0] != (tokens, requests):
            self._last = (tokens, requests), self._place(tokens, requests)
        return self._last[1]

    def _place(self, tokens: int, requests: int) -> Held:
        if self._device is not None:
            return self._device.held(tokens, requests)
        ids, positions, offsets = self.tokens[:3, :tokens]
        return ids, positions, self.tokens[3:, :tokens], offsets, self.tables[:, :requests], self.contexts[:requests]

    def chunk_places(self, tokens: int, requests: int) -> Tensor:
        """Where the model reads the places of such a step's chunks: integers [CHUNKS, 4]."""
        return self._chunk_places if self._device is None else self._device.chunk_places(tokens, requests)

    def on_device(self, tokens: int, requests: int, placed: bool = False) -> Held:
        """The same, after copying there what is new; placed: the places of chunks with it."""
        if self._device is not None:
            changed = sorted(row for row in self._changed if row < requests)
            columns = self.tokens[:, :tokens].numpy()
            chunk_places = self._chunk_places.numpy() if placed else None
            self._device.copy(columns, self.rows[:requests], self._tables, changed, chunk_places)
            self._changed.difference_update(changed)
        return self.held(tokens, requests)
