"""Whether a model and its KV pool fit into memory at all, told from the configuration before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from dsc_kernels.weights import SCALE_BYTES
from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.engine.kv_cache import blocks_for
from dsc_serve.machine import available_memory
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import CheckpointError, ModelConfig

ANGLE_BYTES = 4
KV_BYTES = 2  # at least: with float32, as many again
TABLE_BYTES = 8


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def configured(path: Path, context: int) -> ModelConfig:
    """Raises CheckpointError."""
    try:
        return open_source(path).config.with_context(context)
    except ValueError as error:
        raise CheckpointError(str(error) if isinstance(error, CheckpointError) else f"{path}: {error}") from None


def check_room(folder: Path, config: EngineConfig) -> None:
    """Raises ConfigError and CheckpointError."""
    model = configured(folder, config.context)
    free = torch.cuda.mem_get_info(0)[0] if config.device == "cuda" else available_memory()
    positions = position_bytes(model, config)
    if positions > free:
        what = f"max_position_embeddings is {model.max_position_embeddings}, for which tables of {size(positions)}"
        raise ConfigError(f"{folder}: {what} are needed; {size(free)} of memory are free")
    blocks = blocks_for(config.kv_tokens or model.max_position_embeddings, config.block_size)
    row = model.head_dim + SCALE_BYTES if config.kv_dtype == "int8" else model.head_dim * KV_BYTES
    pool = 2 * blocks * config.block_size * model.num_hidden_layers * model.num_key_value_heads * row
    if pool + positions > free:
        needed = f"{blocks} blocks of {config.block_size} tokens take {size(pool)}; {size(free)} of memory are free"
        if config.kv_tokens:
            raise ConfigError(f"kv_tokens is {config.kv_tokens}: {needed}; lower it or block_size")
        what = f"max_position_embeddings is {model.max_position_embeddings}, and one context must fit"
        raise ConfigError(f"{folder}: {what}: {needed}; set kv_tokens to hold less")


def position_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """What every position takes beside its keys and values: its places in the tables of blocks and, on a GPU, where
    they are not made as contexts need them, its angles.
    """
    made_at_once = config.device == "cuda" and model.position_embedding_type != "learned"
    angles = model.head_dim * ANGLE_BYTES if made_at_once else 0
    tables = config.max_running * blocks_for(model.max_position_embeddings, config.block_size) * TABLE_BYTES
    return model.max_position_embeddings * angles + tables
