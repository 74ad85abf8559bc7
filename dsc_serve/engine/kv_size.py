"""How many KV blocks an engine has."""

from __future__ import annotations

import logging

import torch

from dsc_serve.config import EngineConfig
from dsc_serve.engine.room import reserved_for_adapters
from dsc_serve.kv_layout import KvLayout
from dsc_serve.machine import available_memory
from dsc_serve.model.decoder import Decoder

log = logging.getLogger(__name__)
KV_SHARE = {"cpu": 0.2, "cuda": 0.8}  # of the memory that is free, what a pool may take where its size is not given


def block_bytes(model: Decoder, config: EngineConfig) -> int:
    """Bytes of a KV block."""
    return config.block_size * model.group_bytes(config.kv_dtype == "int8")


def pool_blocks(model: Decoder, config: EngineConfig, companion: Decoder | None = None) -> int:
    """KV blocks for `kv_tokens` that all layers hold; where that is 0, for `max_running` full contexts, but at most
    KV_SHARE of free memory and at least one context. companion: another model that keeps as many tokens. Of ranks that
    share a model, each has as many blocks, of its heads.
    """
    c, layout = model.config, KvLayout(config.block_size, model.groups.windows)
    if config.kv_tokens:
        return layout.groups * layout.pages(config.kv_tokens)
    ranks_here = config.tensor_parallel if config.device == "cpu" else 1  # which take from the same memory
    per_block = ranks_here * block_bytes(model, config)
    if companion is not None:
        per_block += -(-len(companion.groups.windows) * block_bytes(companion, config) // layout.groups)
    torch.cuda.empty_cache()  # else what loading left there would count as used
    free = torch.cuda.mem_get_info(model.device)[0] if config.device == "cuda" else available_memory()
    free = max(0, free - reserved_for_adapters(config))
    context = layout.most_blocks(c.max_position_embeddings, config.step_tokens)
    fitting = int(KV_SHARE[config.device] * free) // per_block
    if fitting < context:
        log.warning(
            "the KV pool's %d tokens, one whole context, are more than %d %% of the %d MiB that are free; "
            "set kv_tokens to choose its size",
            *(c.max_position_embeddings, 100 * KV_SHARE[config.device], free >> 20),
        )
    return max(context, min(config.max_running * context, fitting))
