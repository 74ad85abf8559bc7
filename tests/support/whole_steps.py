"""Whole prompts through a decoder in one step, each with the adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_kernels.backend import BoundAdapter
from dsc_kernels.weights import AdapterRun
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder

BLOCK = 8


def decoder(config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(config, tensors, dtype, torch.device("cpu"))


def step(
    model: Decoder, prompts: Sequence[list[int]], adapters: Sequence[BoundAdapter | None], joins: bool = False
) -> list[Tensor]:
    """Logits of each prompt, all in one step: those of one token first.

    joins: neighbours of one adapter are one run, as the engine says them; else each prompt is one.
    """
    singles = sum(len(prompt) == 1 for prompt in prompts)
    assert all(len(prompt) == 1 for prompt in prompts[:singles])
    pages = max(6, -(-max(map(len, prompts)) // BLOCK))
    tables = torch.arange(len(prompts) * pages).view(len(prompts), pages)
    rows = [(i, position) for i, prompt in enumerate(prompts) for position in range(len(prompt))]
    owners, positions = torch.tensor(rows).unbind(1)
    starts = [sum(map(len, prompts[:i])) for i in range(len(prompts))]
    chunks = tuple(Chunk(i, starts[i], len(p), len(p)) for i, p in enumerate(prompts) if i >= singles)
    runs: list[AdapterRun] = []
    for start, prompt, adapter in zip(starts, prompts, adapters, strict=True):
        if adapter is None:
            continue
        last = runs[-1] if runs else None
        if joins and last is not None and last.adapter is adapter and last.first + last.length == start:
            runs[-1] = AdapterRun(adapter, last.first, last.length + len(prompt))
        else:
            runs.append(AdapterRun(adapter, start, len(prompt)))
    batch = StepBatch(
        torch.tensor([token for prompt in prompts for token in prompt]),
        positions.contiguous(),
        tables[owners, positions // BLOCK][None],
        positions % BLOCK,
        tables[None],
        torch.tensor([len(prompt) for prompt in prompts]),
        singles,
        1 if singles else 0,
        chunks,
        tuple(runs),
    )
    with torch.inference_mode():
        hidden = model.hidden(batch, model.kv_caches(len(prompts) * pages, BLOCK))
        return list(torch.split(model.logits(hidden), [len(prompt) for prompt in prompts]))


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]
