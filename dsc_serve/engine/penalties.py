"""Bias, penalties and masks of early ends for all rows of a step at once, on a device that is never waited for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsc_serve.engine.position import Position

Changes = list[tuple[NDArray[np.int64], NDArray[np.float32]]]  # of each row indices into all logits, and numbers


def adjust_together(logits: Tensor, requests: Sequence[Position], eos: Sequence[int]) -> None:
    """Change rows of contiguous float32 logits [R, V] in place as `Sampler` does one by one. eos: as there.

    What differs from row to row goes to the device in one copy, however many rows there are.
    """
    kinds: tuple[Changes, ...] = [], [], [], []
    bias, repetition, counted, ends = kinds
    for row, request in enumerate(requests):
        p, start = request.params, row * logits.shape[1]
        if p.logit_bias:
            add(bias, start, list(p.logit_bias), list(p.logit_bias.values()))
        if p.repetition_penalty != 1:
            add(repetition, start, request.token_counts(0).tokens, p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and request.output_size:
            output = request.token_counts(request.prompt_size)
            counts = output.counts.astype(np.float32)
            add(
                counted, start, output.tokens, counts * np.float32(p.frequency_penalty) + np.float32(p.presence_penalty)
            )
        if request.output_size < p.min_tokens:
            add(ends, start, [*p.stop_token_ids, *(() if p.ignore_eos else eos)], -np.inf)
    if not any(kinds):
        return
    sizes = [sum(len(logit_indices) for logit_indices, _ in changes) for changes in kinds]
    packed = np.empty((2, sum(sizes)))  # in float64, which holds both exactly
    np.concatenate(
        [logit_indices for changes in kinds for logit_indices, _ in changes], out=packed[0], casting="unsafe"
    )
    np.concatenate([numbers for changes in kinds for _, numbers in changes], out=packed[1])
    moved = torch.from_numpy(packed)
    if logits.device.type != "cpu":
        moved = moved.pin_memory().to(logits.device, non_blocking=True)
    flat = logits.view(-1)
    own = zip(torch.split(moved[0].long(), sizes), torch.split(moved[1].float(), sizes), strict=True)
    for (logit_indices, numbers), change in zip(own, (added, repeated, subtracted, put), strict=True):
        if len(logit_indices):
            flat[logit_indices] = change(flat[logit_indices], numbers)


def add(changes: Changes, start: int, tokens: Sequence[int] | NDArray[np.int64], numbers: object) -> None:
    """Of a row that starts there these tokens, and a number of each, or one for all."""
    logit_indices = np.asarray(tokens, dtype=np.int64) + start
    changes.append((logit_indices, np.broadcast_to(np.asarray(numbers, dtype=np.float32), logit_indices.shape)))


def added(logits: Tensor, bias: Tensor) -> Tensor:
    return logits + bias


def repeated(logits: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def subtracted(logits: Tensor, amount: Tensor) -> Tensor:
    return logits - amount


def put(logits: Tensor, instead: Tensor) -> Tensor:
    return instead
