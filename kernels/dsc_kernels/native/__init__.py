"""The C++ kernels for CPUs: packed weights, and whole layers in one call.

Missing where no compiler was found at installation; then `available()` is empty and plain torch serves (`ops`).
Tensors are float32 or bfloat16 on the CPU. A layer keeps the tensors whose addresses it holds.
"""

from __future__ import annotations

from dsc_kernels.native.attention import UNLIMITED, check_angles, chunk_attention, decode_attention, store_kv
from dsc_kernels.native.dispatch import (
    ROUTER_PRECISIONS,
    SCREENING_SETS,
    RouterPrecision,
    active,
    available,
    module,
    router_precision,
    screens,
    serves,
    threads,
    use,
    use_router,
)
from dsc_kernels.native.layers import MAX_PICKS, Activation, Ffn, Linear, Moe, norm, pack
from dsc_kernels.native.tensors import address, check, half
from dsc_kernels.native.tokens import min_hash_order, sample, tile_unions

__all__ = [
    "MAX_PICKS",
    "ROUTER_PRECISIONS",
    "SCREENING_SETS",
    "UNLIMITED",
    "Activation",
    "Ffn",
    "Linear",
    "Moe",
    "RouterPrecision",
    "active",
    "address",
    "available",
    "check",
    "check_angles",
    "chunk_attention",
    "decode_attention",
    "half",
    "min_hash_order",
    "module",
    "norm",
    "pack",
    "router_precision",
    "sample",
    "screens",
    "serves",
    "store_kv",
    "threads",
    "tile_unions",
    "use",
    "use_router",
]
