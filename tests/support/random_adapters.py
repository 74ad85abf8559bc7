"""Adapters of random numbers for the embedded model, and that model with some of them merged into it."""

from __future__ import annotations

from pathlib import Path

import torch

from dsc_serve.config import EMBEDDED_MODEL, resolve_model
from dsc_serve.model.adapter import Adapter
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.peft import read_adapter, write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.text.tokenizer import FILES

BELOW = {"q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "o": "self_attn.o"}


def random_adapters(folder: Path, *names: str, rank: int = 4, strength: float = 0.15, seed: int = 0) -> None:
    """One of each name below the folder, of all modules of every second layer."""
    base = Base(open_source(resolve_model(EMBEDDED_MODEL)).config, None)
    for name in names:
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        modules = {
            own.name: Matrices(
                torch.randn(rank, own.into, generator=generator) / own.into**0.5,
                strength * torch.randn(own.out, rank, generator=generator),
            )
            for own in base.modules.values()
            if (own.layer or 0) % 2 == 0
        }
        write_adapter(folder / name, EMBEDDED_MODEL, 2.0 * rank, modules)


def adapter_of(folder: Path) -> Adapter:
    return read_adapter(folder, open_source(resolve_model(EMBEDDED_MODEL)).config)


def merged_model(out: Path, *weighted: tuple[Adapter, float]) -> Path:
    """The embedded model with the adapters added to its weights, as a folder with its tokenizer."""
    path = resolve_model(EMBEDDED_MODEL)
    source = open_source(path)
    tensors = {name: tensor.float() for name, tensor in source.weights().items()}
    for adapter, weight in weighted:
        for (layer, module), own in adapter.modules.items():
            name = f"model.layers.{layer}.{BELOW.get(module, f'mlp.static.{module}')}_proj.weight"
            tensors[name] = tensors[name] + weight * own.scale * own.up.float() @ own.down.float()
    save_checkpoint(source.config, tensors, out, path)
    for name in FILES:
        if (path / name).is_file():
            (out / name).write_bytes((path / name).read_bytes())
    return out
