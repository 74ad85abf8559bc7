"""Compiles what the configurations of `dsc_kernels.aot` leave out: other dtypes, odd sizes, gates, adapters, extremes.

Prints one line for each kernel that does not compile, or needs more shared memory than its target has. A script, since
it cannot share a process with interpreted kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from dsc_kernels import aot
from dsc_kernels.gpu import attention, contract, expand, moe, router, select_compose

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
INDEX, FLOAT = "*i32", "*fp32"


def of_router(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    types = {"x": "*bf16", "weight": t, "bias": FLOAT, "logits": FLOAT, "maxima": FLOAT}
    for batch, atoms, d in ((1, 1523, 384), (65, 1523, 384), (1, 101, 67), (65, 101, 67)):
        meta = {**router.blocks(batch, atoms, dtype), "d": d, "normed": d == 67, "bias": None}
        yield aot.Job(f"route {t} {batch} {d}", router.route, meta, types)
    meta = {**router.blocks(1, 1, dtype), "d": 384, "normed": True, **dict.fromkeys(("batch", "atoms", "groups"), 1)}
    yield aot.Job(f"route {t} ones", router.route, meta, types)


def of_moe(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    types = {"x": t, "weight": t, "gate": t, "order": INDEX, "offsets": INDEX, "out": t}
    for rows, inner, outer in ((2, 384, 560), (1280, 4096, 14336), (1280, 67, 41)):
        sizes = {"k": 2, "inner": inner, "outer": outer, "first": True, "activation": "silu", "scales": None}
        meta = {**moe.blocks(rows, 8, dtype), **sizes}
        yield aot.Job(f"experts {t} {rows} {inner}", moe.multiply_experts, meta, types)


def of_attention(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    types = {"q": t, "keys": t, "values": t, "tables": "*i64", "contexts": "*i64", "stats": FLOAT, "out": FLOAT}
    for group, size in ((1, 64), (4, 128), (3, 20), (1, 256), (32, 128)):
        meta = attention.blocks(group, size, 16, 8, dtype)
        yield aot.Job(f"attend {t} {group} {size}", attention.attend, meta, types)
    meta = {**attention.blocks(1, 64, 16, 8, dtype), **dict.fromkeys(("kv_heads", "table_stride"), 1)}
    yield aot.Job(f"attend {t} ones", attention.attend, meta, types)


def of_composition(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    bank = {"x": t, "u": t, "v": t, "gamma": FLOAT, "static": t, "residual": t, "out": t}
    trace = {"picks": INDEX, "coefficients": FLOAT, "signals": FLOAT}
    for k, rank, d, atoms in ((2, 4, 384, 60), (2, 3, 67, 21), (64, 0, 4096, 16384), (64, 0, 384, 65536), (1, 0, 1, 1)):
        label = f"{t} {k} {rank} {d}"
        flags: dict[str, Any] = {"softmax": rank > 0, "scalar_gamma": True, "residual": None}
        meta = {**select_compose.blocks(k, -(-atoms // router.GROUP), d, rank), **flags}
        types = {"logits": FLOAT, "maxima": FLOAT, **bank, **trace}
        if atoms == 1:
            meta |= {"atoms": 1, "groups": 1}  # arguments of 1 are compiled in, as Triton does when it launches
        yield aot.Job(f"select_compose {label}", select_compose.select_compose_tokens, meta, types)
        meta = contract.blocks(k, max(rank, 1), d)
        stretches = -(-d // meta["d_per_block"])
        yield aot.Job(f"contract {label}", contract.contract_rows, meta, {**bank, **trace, "latent": FLOAT})
        meta = {**expand.blocks(k, max(rank, 1), d), "stretches": stretches, "scalar_gamma": True}
        yield aot.Job(f"expand {label}", expand.expand_columns, meta, {**bank, **trace, "latent": FLOAT})


def problems() -> Iterator[str]:
    for dtype in POINTERS:
        for family in (of_router, of_moe, of_attention, of_composition):
            for job in family(dtype):
                for target, most in SHARED_BYTES.items():
                    try:
                        row = aot.measure(job, "variant", target)
                    except Exception as error:
                        yield f"{job.name} for {target}: {type(error).__name__}: {error}"
                        continue
                    if row["shared_bytes"] > most:
                        yield f"{job.name} for {target}: {row['shared_bytes']} bytes of shared memory, at most {most}"


if __name__ == "__main__":
    count = 0
    for problem in problems():
        print(problem, flush=True)
        count += 1
    sys.exit(count > 0)
