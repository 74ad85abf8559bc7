"""The C++ kernels for CPUs: packed weights, and whole layers in one call.

Missing where no compiler was found at installation; then `available()` is empty and plain torch serves (`ops`).
Tensors are float32 or bfloat16 on the CPU. A layer keeps the tensors whose addresses it holds.
"""

from __future__ import annotations

from dsc_kernels.native.adapters import adapter, summed
from dsc_kernels.native.attention import chunk_attention, chunks_attention, decode_attention, places_chunks, store_kv
from dsc_kernels.native.dispatch import (
    ROUTER_PRECISIONS,
    SCREENING_SETS,
    WIDENING_SETS,
    RouterPrecision,
    active,
    available,
    router_precision,
    screens,
    serves,
    threads,
    use,
    use_router,
)
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.head import HEAD_PRECISIONS, Head, HeadPrecision, head_precision, screens_head, use_head
from dsc_kernels.native.layers import NAME, Ffn, Linear, norm
from dsc_kernels.native.moe import Moe
from dsc_kernels.native.packing import pack
from dsc_kernels.native.panels import basis
from dsc_kernels.native.stack import Stack, stack
from dsc_kernels.native.tokens import min_hash_order, sample, tile_unions
from dsc_kernels.picking import compose_rows

name = NAME
dequantises: tuple[str, ...] = ()

__all__ = [
    "HEAD_PRECISIONS",
    "ROUTER_PRECISIONS",
    "SCREENING_SETS",
    "WIDENING_SETS",
    "Ffn",
    "Head",
    "HeadPrecision",
    "Linear",
    "Moe",
    "RouterPrecision",
    "Stack",
    "active",
    "adapter",
    "available",
    "basis",
    "chunk_attention",
    "chunks_attention",
    "compose_rows",
    "decode_attention",
    "dequantises",
    "head_precision",
    "kernels",
    "min_hash_order",
    "name",
    "norm",
    "pack",
    "places_chunks",
    "router_precision",
    "sample",
    "screens",
    "screens_head",
    "serves",
    "stack",
    "store_kv",
    "summed",
    "threads",
    "tile_unions",
    "use",
    "use_head",
    "use_router",
]
