"""The tenants of a run: for each text an adapter's numbers, and the order in which it sees its windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.config import ModelConfig
from dsc_serve.train.adapt.settings import AdapterRunSettings, AdaptSettings
from dsc_serve.train.corpus import Corpus, WindowSampler, prepare, source_name
from dsc_serve.train.settings import DataSettings

Key = tuple[int, str]


@dataclass(frozen=True)
class Tenant:
    """One text and what is trained of it. Its numbers are drawn by its own name, whoever is trained beside it."""

    name: str
    corpus: Corpus
    sampler: WindowSampler


def tenants_of(
    files: Sequence[Path], settings: AdapterRunSettings, tokenizer: Path, vocab_size: int, folder: Path
) -> list[Tenant]:
    """One for each text, in the order of their names. Raises TrainError."""
    data = DataSettings(held_out=settings.held_out, tokenizer=str(tokenizer))
    found = []
    for file in sorted(files, key=source_name):
        corpus = prepare([file], data, vocab_size, folder / source_name(file))
        found.append(Tenant(source_name(file), corpus, WindowSampler(corpus.train, settings.seed)))
    return found


def fresh_updates(
    config: ModelConfig, settings: AdaptSettings, tenants: Sequence[Tenant]
) -> dict[Key, tuple[Tensor, Tensor]]:
    """By layer and module down [N, r, in], uniform as PEFT draws it, and up [N, out, r], zero; float32."""
    shapes = {key: shape for key, shape in module_shapes(config).items() if key[1] in settings.modules}
    drawn: dict[Key, list[Tensor]] = {key: [] for key in shapes}
    for tenant in tenants:
        generator = torch.Generator().manual_seed(settings.seed * 2**32 + sum(tenant.name.encode()))
        for key, (_, into) in shapes.items():
            bound = into**-0.5  # of Kaiming's uniform distribution with a = √5
            drawn[key].append((2 * torch.rand(settings.rank, into, generator=generator) - 1) * bound)
    return {
        key: (torch.stack(drawn[key]), torch.zeros(len(tenants), out, settings.rank))
        for key, (out, _) in shapes.items()
    }


def clip(updates: Mapping[Key, tuple[Tensor, Tensor]], most: float) -> Tensor:
    """Shorten each tenant's gradient to a norm of at most `most`, by itself; returns the norms [N] before."""
    grads = [tensor.grad for pair in updates.values() for tensor in pair if tensor.grad is not None]
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
    factors = (most / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factors.view(-1, 1, 1))
    return norms
