"""Whether a model and its KV pool fit into memory at all, told from the configuration before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from dsc_serve.config import ConfigError, EngineConfig, resolve_model
from dsc_serve.kv_layout import KvLayout
from dsc_serve.machine import available_memory
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.exchange import Shard
from dsc_serve.model.layer_groups import layer_groups, token_bytes
from dsc_serve.model.sharding import rank_config

WHOLE = Shard()
ANGLE_BYTES = 4
KV_BYTES = 2  # at least, but in int8: with float32, as many again
TABLE_BYTES = 8


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def configured(path: Path, context: int, shard: Shard = WHOLE) -> ModelConfig:
    """The model at a path, or what a rank has of it. Raises CheckpointError."""
    try:
        return rank_config(open_source(path).config.with_context(context), shard)
    except ValueError as error:
        raise CheckpointError(str(error) if isinstance(error, CheckpointError) else f"{path}: {error}") from None


def reserved_for_adapters(config: EngineConfig) -> int:
    """Bytes that nothing else may take."""
    return config.adapter_bytes if config.adapters else 0


def check_room(folder: Path, config: EngineConfig, shard: Shard = WHOLE) -> None:
    """For all ranks together on the CPU, where they share its memory; on GPUs for this one.

    Raises ConfigError and CheckpointError.
    """
    model = configured(folder, config.context, shard if config.device == "cuda" else WHOLE)
    free = torch.cuda.mem_get_info(shard.rank)[0] if config.device == "cuda" else available_memory()
    adapters = reserved_for_adapters(config)
    if adapters > free:
        raise ConfigError(f"adapter_bytes is {adapters}; {size(free)} of memory are free: lower it")
    free -= adapters
    positions = position_bytes(model, config)
    if positions > free:
        what = f"max_position_embeddings is {model.max_position_embeddings}, for which tables of {size(positions)}"
        raise ConfigError(f"{folder}: {what} are needed; {size(free)} of memory are free")
    layout, int8 = KvLayout(config.block_size, layer_groups(model).windows), config.kv_dtype == "int8"
    blocks = layout.most_blocks(model.max_position_embeddings, config.step_tokens)
    if config.kv_tokens:
        blocks = layout.groups * layout.pages(config.kv_tokens)
    pool = blocks * config.block_size * token_bytes(model, KV_BYTES, int8)
    if config.draft_model:
        pool += companion_bytes(configured(resolve_model(config.draft_model), 0), config, -(-blocks // layout.groups))
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
    layout = KvLayout(config.block_size, layer_groups(model).windows)
    tables = config.max_running * layout.pages(model.max_position_embeddings) * layout.groups * TABLE_BYTES
    return model.max_position_embeddings * angles + tables


def companion_bytes(model: ModelConfig, config: EngineConfig, pages: int) -> int:
    """What a draft model's keys and values of so many pages take, all groups of its layers together."""
    groups = layer_groups(model)
    each = token_bytes(model, KV_BYTES, config.kv_dtype == "int8")
    return pages * len(groups.windows) * config.block_size * each
