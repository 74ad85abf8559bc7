"""A step's inputs on a device: one copy of what is new, packed, and tables that stay there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 4  # numbers: kernels are compiled apart for what does not begin at a multiple of 16 bytes
CHUNKS = 8  # chunks of prompts of which it is told where they are

Held = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # ids, positions, blocks, offsets, tables, contexts


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class DeviceInputs:
    """Buffers on a device that stay where they are, int32: columns of tokens and contexts, and tables.

    columns: of tokens. Where a step's columns stand in their buffer depends on how many tokens and requests it has,
    and on nothing else, so that it can be captured; so do the places of its chunks, which only captured steps have.
    """

    def __init__(
        self, columns: int, step_tokens: int, groups: int, requests: int, width: int, device: torch.device
    ) -> None:
        self._columns = columns
        size = columns * aligned(step_tokens) + 2 * aligned(requests) + 4 * CHUNKS + requests * groups * width
        pinned = device.type != "cpu"
        self._staged = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._host: NDArray[np.int32] = self._staged.numpy()  # the same memory
        self._there = torch.zeros(size, dtype=torch.int32, device=device)
        self._tables = torch.zeros(requests, groups, width, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the last copy has left the host's buffer."""
        if self._copied is not None:
            self._copied.synchronize()

    def held(self, tokens: int, requests: int) -> Held:
        """Where a step of so many tokens and requests lies."""
        stride = aligned(tokens)
        columns = self._there[: self._columns * stride].view(self._columns, stride)[:, :tokens]
        contexts = self._there[self._columns * stride :][:requests]
        ids, positions, offsets = columns[:3]
        return ids, positions, columns[3:], offsets, self._tables[:requests].transpose(0, 1), contexts

    def chunk_places(self, tokens: int, requests: int) -> Tensor:
        """Where the places [CHUNKS, 4] of the chunks of such a step lie."""
        at = self._columns * aligned(tokens) + aligned(requests)
        return self._there[at : at + 4 * CHUNKS].view(CHUNKS, 4)

    def copy(
        self,
        tokens: NDArray[np.int64],
        contexts: NDArray[np.int64],
        tables: NDArray[np.int64],
        changed: Sequence[int],
        chunk_places: NDArray[np.int64] | None = None,
    ) -> None:
        """Copy columns [columns, T], contexts [S], and of tables [groups, ≥ S, width] the rows that have changed.

        chunk_places: [CHUNKS, 4], where the step has any.
        """
        (columns, count), (requests,), (groups, _, width) = tokens.shape, contexts.shape, tables.shape
        stride = aligned(count)
        self._host[: columns * stride].reshape(columns, stride)[:, :count] = tokens
        at = columns * stride
        self._host[at : at + requests] = contexts
        at += aligned(requests)
        if chunk_places is not None:
            self._host[at : at + chunk_places.size] = chunk_places.reshape(-1)
            at += chunk_places.size
        rows_at = at + aligned(len(changed))
        end = rows_at + len(changed) * groups * width
        self._host[at : at + len(changed)] = changed
        self._host[rows_at:end].reshape(len(changed), groups, width)[:] = tables[:, changed].transpose(1, 0, 2)
        self._there[:end].copy_(self._staged[:end], non_blocking=True)
        if changed:
            index = self._there[at : at + len(changed)].long()
            self._tables.index_copy_(0, index, self._there[rows_at:end].view(len(changed), groups, width))
        if self._copied is not None:
            self._copied.record()
