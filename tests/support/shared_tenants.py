"""LoRAs of common directions for a small model, and the same adapters as cores on a basis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.cores.share import share
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices
from support.small_models import small_config, wide_tensors

LLAMA = {"norm_type": "rmsnorm", "hidden_act": "silu", "mlp_gated": True, "num_key_value_heads": 1}
DIRECTIONS = 6  # that all adapters of a base have


def small_base(folder: Path) -> Path:
    config = small_config("dense", max_position_embeddings=96, **LLAMA)
    save_checkpoint(config, wide_tensors(config), folder)
    return folder


def write_loras(
    base: Path, out: Path, names: Iterable[str], rank: int = 3, common: int = 0, only: str = "", apart: str = ""
) -> None:
    """common: which directions; adapters of other ones share nothing. only: modules whose names have it in them;
    apart: of these, modules whose directions are others.
    """
    modules = Base(open_source(base).config, None).modules.values()
    for name in names:
        g = torch.Generator().manual_seed(sum(name.encode()))
        made = {}
        for i, own in enumerate(modules):
            if only not in own.name:
                continue
            other = bool(apart) and apart in own.name
            shared = torch.Generator().manual_seed(1000 * (common + other) + i)
            down = torch.randn(DIRECTIONS, own.into, generator=shared) / own.into**0.5
            up = torch.randn(own.out, DIRECTIONS, generator=shared)
            mixed = torch.randn(rank, DIRECTIONS, generator=g), torch.randn(DIRECTIONS, rank, generator=g)
            made[own.name] = Matrices(mixed[0] @ down, 0.15 * up @ mixed[1])
        write_adapter(out / name, "small", 2.0 * rank, made)


def write_shared(loras: Path, out: Path, names: Iterable[str]) -> Path:
    """Their basis and cores; returns the basis's file."""
    found = share([loras / name for name in names], out, DIRECTIONS, None)
    return out / f".basis-{found.digest[:16]}.safetensors"
