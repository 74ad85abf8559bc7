"""Queries, keys and values in one matrix whose rows lie in groups of heads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dsc_serve.model.architectures.tensors import Tensors, split_rows
from dsc_serve.model.config import ModelConfig


def split_heads(tensors: Tensors, attention: str, groups: int, config: ModelConfig, path: Path) -> None:
    """In place: the rows of `qkv.weight` and `qkv.bias` below `attention` become q, k and v.

    They lie in groups, each of its query heads, a head of keys and one of values. Raises CheckpointError.
    """
    queries, size = config.num_attention_heads // groups, config.head_dim

    def take(whole: Tensor, *, number: int) -> Tensor:
        heads = whole.view(groups, queries + 2, size, *whole.shape[1:])
        own = heads[:, :queries] if number == 0 else heads[:, queries + number - 1]
        return own.reshape(-1, *whole.shape[1:])

    for part in ("weight", "bias"):
        rows = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
        names = {f"{attention}{name}_proj.{part}": size for name, size in rows.items()}
        split_rows(tensors, f"{attention}qkv.{part}", names, path, take)
