"""Compiles what the configurations of `dsc_kernels.aot` leave out: other dtypes, odd sizes, gates, adapters, extremes.

Prints one line for each kernel that does not compile, or needs more shared memory than its target has. A script, since
it cannot share a process with interpreted kernels; its arguments name some of FAMILIES, all by default.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dsc_kernels import aot
from dsc_kernels.gpu import (
    add_norm,
    attention,
    chunk_attention,
    contract,
    expand,
    ffn_in,
    moe,
    pick_experts,
    place_slots,
    product,
    qkv,
    rescore,
    route_experts,
    screen,
    select_compose,
)
from dsc_kernels.gpu.compiler import tuned_for
from dsc_kernels.weights import MoeOptions, Scope

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
INDEX, FLOAT = "*i32", "*fp32"


BATCHES = (1, 17, 64, 65)


def of_products(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    types = {**dict.fromkeys(("x", "weight", "router", "up", "gate", "hidden", "down", "residual"), t), "parts": FLOAT}
    types |= dict.fromkeys(("router_bias", "rstd", "logits", "maxima", "terms", "cos_sin", "rstd_out"), FLOAT)
    types |= {"levels": "*i8", "scales": "*bf16", "errors": FLOAT, "length": FLOAT, "length_out": FLOAT}
    types |= {"lowest": FLOAT, "counts": "*i64"}
    whole = dict.fromkeys(("levels", "scales", "errors", "length"))
    types |= dict.fromkeys(("q", "keys", "values", "qkv", "bias", "norm_weight", "further", "up_bias", "gate_bias"), t)
    types |= dict.fromkeys(("normed_out", "total_out", "query_norm", "key_norm"), t)
    types |= dict.fromkeys(("positions", "slot_blocks", "slot_offsets"), INDEX)
    for batch, rows, d in (*((batch, 1523, 384) for batch in BATCHES), (1, 101, 67), (65, 101, 67), (64, 8192, 4096)):
        label = f"{t} {batch} {d}"
        meta = product.tiles(batch, rows, dtype)
        yield aot.Job(f"multiply {label}", product.multiply_rows, {**meta, "d": d, "splits": 1, "bias": None}, types)
        for gate, activation in ((None, "gelu"), (t, "silu")):
            meta = ffn_in.blocks(batch, rows, dtype, gated=gate is not None)
            constants = {
                **meta,
                **whole,
                "d": d,
                "activation": activation,
                **({} if gate else {"gate": None, "gate_bias": None}),
            }
            yield aot.Job(f"route_and_raise {label} {activation}", ffn_in.route_and_raise, constants, types)
        alone = {"up": None, "up_bias": None, "gate": None, "gate_bias": None, "hidden": None, "rstd": None}
        constants = {**ffn_in.blocks(batch, rows, dtype, beside=False), **alone, "d": d, "activation": "none"}
        yield aot.Job(f"route {label}", ffn_in.route_and_raise, {**constants, **whole}, types)
        if batch <= screen.SCREENED_TOKENS:
            yield aot.Job(f"screen {label}", ffn_in.route_and_raise, constants, types)
            gated = ffn_in.blocks(batch, rows, dtype, gated=True)
            constants = {**gated, "d": d, "activation": "silu"}
            yield aot.Job(f"screen_and_raise {label}", ffn_in.route_and_raise, constants, types)
            for atoms, k, tiles in ((rows, 4, gated), (65536, 64, ffn_in.blocks(batch, 65536, dtype, beside=False))):
                meta = rescore.rescore_blocks(batch, atoms, -(-atoms // ffn_in.GROUP), k, tiles)
                yield aot.Job(f"rescore {label} {atoms}", rescore.rescore_rows, {**meta, "d": d}, types)
        for size in (16, 64, 128, 256):
            meta = {**qkv.head_tiles(batch, rows, size, dtype), "size": size, "block": 16, "d": d}
            yield aot.Job(f"project {label} {size}", qkv.project_heads, meta, types)
    for size, turned in ((64, 64), (80, 20), (256, 0)):
        meta = qkv.prepare_blocks(size, 16, turned)
        yield aot.Job(f"prepare_heads {t} {size}", qkv.prepare_heads, meta, types)
    for d in (67, 384, 8192):
        meta = {**add_norm.blocks(d), "count": 9, "weight": None, "normed_out": None, "bias": None}
        yield aot.Job(f"add_norm {t} {d}", add_norm.add_norm_rows, meta, types)


def of_moe(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    shared = {"shared_x": t, "shared_weight": t, "shared_gate": t, "shared_out": t}
    types = {"x": t, "weight": t, "gate": t, "picks": INDEX, "order": INDEX, "offsets": INDEX, "out": t, **shared}
    for batch, k, inner, outer in ((1, 2, 384, 560), (64, 8, 2048, 1408), (256, 2, 384, 560), (640, 2, 4096, 14336)):
        own = {"shared_inner": inner, "shared_outer": outer, "shared_scales": None, "outputs_per_token": k + 1}
        for label, options in (("beside", own), ("alone", {**dict.fromkeys(own, 0), **dict.fromkeys(shared)})):
            constants = {"inner": inner, "outer": outer, "first": True, "activation": "silu", "scales": None, **options}
            sorts = batch > moe.DIRECT_TOKENS
            unsorted = ("picks",) if sorts else ("order", "offsets")
            meta = {**moe.blocks(batch, k, 8, dtype, sorts), **constants, **dict.fromkeys(unsorted)}
            meta |= {"shared_scales": None, "outputs_per_token": k + 1}
            yield aot.Job(f"experts {t} {batch} {inner} {label}", moe.multiply_experts, meta, types)


def of_routing(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    types = {"logits": FLOAT, "choice_bias": FLOAT, "weights_out": FLOAT, "experts_out": INDEX}
    norm = dict.fromkeys(("residual", "further", "total_out", "norm_weight", "norm_bias", "normed_out", "router"), t)
    norm |= dict.fromkeys(("terms", "router_bias", "shared_gate", "shared_weights"), FLOAT)
    grouped = {"scoring": "sigmoid", "groups": 8, "groups_used": 4, "group_picks": 2}
    for experts, k, options in ((256, 8, grouped), (60, 4, {}), (1, 1, {})):
        choice = MoeOptions(activation="silu", k=k, **options)
        meta = pick_experts.pick_blocks(experts, choice)
        yield aot.Job(f"pick {experts}", pick_experts.pick_tokens, meta, types)
        for d in (67, 2048, 7168):
            meta = {**route_experts.score_blocks(17, experts, d, True), "count": 9}
            yield aot.Job(f"add_norm_score {t} {experts} {d}", route_experts.add_norm_score, meta, {**types, **norm})
        sorted_ = {"picks": INDEX, "order": INDEX, "offsets": INDEX}
        yield aot.Job(f"place {experts}", place_slots.place_slots, place_slots.place_blocks(experts), sorted_)
    for experts, d in ((5, 67), (16, 4096)):
        meta = {**route_experts.add_norm_pick_blocks(experts, d, MoeOptions(activation="silu", k=2), True), "count": 9}
        yield aot.Job(f"add_norm_pick {t} {experts} {d}", route_experts.add_norm_pick, meta, {**types, **norm})


def of_attention(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    types = {"q": t, "keys": t, "values": t, "tables": "*i64", "contexts": "*i64", "stats": FLOAT, "out": t}
    types |= {"plan": INDEX, "parts": FLOAT, "work": INDEX}
    for group, size in ((1, 64), (4, 128), (3, 20), (1, 256), (32, 128)):
        meta = attention.blocks(group, size, 16, 256, dtype, capped=size == 20)
        yield aot.Job(f"attend {t} {group} {size}", attention.attend, meta, types)
        for window in (0, 100):
            meta = chunk_attention.blocks(group, size, 16, dtype, Scope(window, 2.0 * (size == 20)))
            yield aot.Job(f"attend_chunks {t} {group} {size} {window}", chunk_attention.attend_chunks, meta, types)
    meta = {**attention.blocks(1, 64, 16, 1, dtype), **dict.fromkeys(("kv_heads", "table_stride", "sequences"), 1)}
    yield aot.Job(f"attend {t} ones", attention.attend, meta, types)


def of_composition(dtype: torch.dtype) -> Iterator[aot.Job]:
    t = POINTERS[dtype]
    bank = {"x": t, "u": t, "v": t, "gamma": FLOAT, "static": t, "residual": t, "out": t}
    trace = {"picks": INDEX, "coefficients": FLOAT, "signals": FLOAT}
    for k, rank, d, atoms in ((2, 4, 384, 60), (2, 3, 67, 21), (64, 0, 4096, 16384), (64, 0, 384, 65536), (1, 0, 1, 1)):
        label = f"{t} {k} {rank} {d}"
        flags: dict[str, Any] = {"softmax": rank > 0, "scalar_gamma": True}
        groups = -(-atoms // ffn_in.GROUP)
        alone = {**select_compose.ALONE, **dict.fromkeys(("hidden", "down", "down_bias", "parts"))}
        meta = {**select_compose.blocks(k, groups, d, rank), **flags, **alone}
        types = {"logits": FLOAT, "maxima": FLOAT, **bank, **trace, "hidden": t, "down": t, "down_bias": t}
        types |= {"parts": FLOAT}
        for batch in (1, 64):
            beside = select_compose.beside_blocks(k, groups, d, rank, batch, 560, dtype)
            constants = {**beside, **flags, "static": None}
            yield aot.Job(f"compose_beside {label} {batch}", select_compose.select_compose_tokens, constants, types)
        if atoms == 1:
            meta |= {"atoms": 1, "groups": 1}  # arguments of 1 are compiled in, as Triton does when it launches
        yield aot.Job(f"select_compose {label}", select_compose.select_compose_tokens, meta, types)
        meta = contract.blocks(k, max(rank, 1), d)
        stretches = -(-d // meta["d_per_block"])
        yield aot.Job(f"contract {label}", contract.contract_rows, meta, {**bank, **trace, "latent": FLOAT})
        meta = {**expand.blocks(k, max(rank, 1), d), "stretches": stretches, "scalar_gamma": True}
        yield aot.Job(f"expand {label}", expand.expand_columns, meta, {**bank, **trace, "latent": FLOAT})


FAMILIES = {family.__name__: family for family in (of_products, of_moe, of_routing, of_attention, of_composition)}


def problems(names: Sequence[str]) -> Iterator[str]:
    for dtype, name in itertools.product(POINTERS, names):
        for target, most in SHARED_BYTES.items():
            with tuned_for(amd=target.startswith("gfx")):
                jobs = list(FAMILIES[name](dtype))
            for job in jobs:
                try:
                    row = aot.measure(job, "variant", target)
                except Exception as error:
                    yield f"{job.name} for {target}: {type(error).__name__}: {error}"
                    continue
                if row["shared_bytes"] > most:
                    yield f"{job.name} for {target}: {row['shared_bytes']} bytes of shared memory, at most {most}"


if __name__ == "__main__":
    count = 0
    for problem in problems(sys.argv[1:] or list(FAMILIES)):
        print(problem, flush=True)
        count += 1
    sys.exit(count > 0)
