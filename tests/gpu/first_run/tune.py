"""How fast: other tile sizes for the product's own kernels, defaults first. `tune.py warm [FAMILY]` only compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from common import DEVICE, DRY, RESULTS, graph, left_s, save, say, sync, table, time_us
from internals import attention, compose_rows, decode_attention, ffn_in, moe, select_compose, sum_experts

WARM = "warm" in sys.argv
FAMILIES = [word for word in sys.argv[1:] if word != "warm"] or ["route", "attend", "experts", "compose"]
BF16 = torch.bfloat16
ROUTE = {  # by batch: tokens and atoms per block, d per step, warps, stages
    1: [(16, 32, 128, 4, 3), (16, 32, 256, 4, 3), (16, 64, 128, 4, 4), (16, 16, 256, 4, 4), (16, 32, 128, 2, 4)],
    16: [(16, 32, 128, 4, 3), (16, 32, 256, 4, 3), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 128, 4, 3)],
    64: [(16, 32, 128, 4, 3), (64, 32, 64, 4, 4), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 4)],
    256: [(64, 64, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3)],
}
ATTEND = [  # programs that suffice, positions per step (0: the default), warps, stages
    *((264, 0, 4, 5), (132, 0, 4, 5), (528, 0, 4, 5), (1056, 0, 4, 5), (264, 64, 4, 3), (264, 64, 4, 7)),
    *((264, 32, 4, 5), (264, 128, 4, 5), (264, 64, 2, 5), (264, 64, 8, 5)),
]
EXPERTS = {  # few and many rows: rows and columns per block, inner per step, warps, stages
    False: [(16, 32, 64, 4, 3), (16, 64, 64, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 4), (16, 32, 128, 4, 4)],
    True: [(64, 64, 64, 4, 3), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3)],
}
COMPOSE = [(0, 0), (4, 512), (8, 256), (8, 512), (8, 1024), (4, 128)]  # warps, d per step; 0: the default
rows: list[list[object]] = []


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(BF16)


def tried(variants: list) -> list:
    return variants[:2] if DRY else variants


def measure(name: str, launch: Callable[[int], object], copies: int = 1) -> None:
    """launch(i) for copies of different weights, so that the L2 cache holds none."""
    if left_s() < 5:
        return
    try:
        if WARM:
            launch(0)
            sync()
            return
        found = time_us(graph(lambda: [launch(copy) for copy in range(copies)]), copies, 7)
    except Exception as error:  # a variant that does not fit the device is a finding; in the rehearsal it is a mistake
        if DRY:
            raise
        name, found = f"{name} ({type(error).__name__})", float("nan")
    rows.append([name, found])


@contextmanager
def changed(module, **values: object) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def route(d: int, atoms: int, batch: int, copies: int) -> None:
    weights = [bf16(atoms, d) for _ in range(1 if WARM else copies)]
    x, bias, rstd = bf16(batch, d), torch.zeros(atoms, device=DEVICE), torch.ones(batch, device=DEVICE)
    default = ffn_in.tiles
    for tokens, width, step, warps, stages in tried(ROUTE[batch]):

        def tiles(*words, tile=(tokens, width, step, warps, stages)):
            sizes = dict(zip(("tokens_per_block", "rows_per_block", "d_per_step"), tile, strict=False))
            return {**default(*words), **sizes, **({} if DRY else {"num_warps": tile[3], "num_stages": tile[4]})}

        def launch(copy: int) -> None:
            ffn_in.router_logits(x, weights[copy % len(weights)], bias, 20.0, rstd)

        with changed(ffn_in, tiles=tiles):
            measure(f"route d{d} M{atoms} B{batch} {(tokens, width, step, warps, stages)}", launch, copies)
    if not (WARM or DRY):
        measure(
            f"route d{d} M{atoms} B{batch} cuBLAS mm",
            lambda copy: torch.mm(x, weights[copy].T, out_dtype=torch.float32),
            copies,
        )


def attend(kv: int, group: int, size: int, contexts: list[int], label: str) -> None:
    needs = [-(-context // 16) for context in contexts]
    keys, values = bf16(sum(needs), kv, 16, size), bf16(sum(needs), kv, 16, size)
    tables, at = torch.zeros(len(contexts), max(needs), dtype=torch.int64), 0
    order = torch.randperm(sum(needs))
    for row, need in enumerate(needs):
        tables[row, :need] = order[at : at + need]
        at += need
    tables, lengths = tables.to(DEVICE), torch.tensor(contexts, device=DEVICE)
    query, default = bf16(len(contexts), kv * group, size), attention.blocks
    for enough, positions, warps, stages in tried(ATTEND):

        def tiles(*words, positions=positions, warps=warps, stages=stages):
            meta = default(*words)
            step = positions or meta["positions_per_step"]
            return meta if DRY else {**meta, "positions_per_step": step, "num_warps": warps, "num_stages": stages}

        with changed(attention, ENOUGH_PROGRAMS=enough, blocks=tiles):
            measure(
                f"attend {label}: programs {enough}, positions {positions or '-'}, warps {warps}, stages {stages}",
                lambda _: decode_attention(query, keys, values, tables, lengths, max(contexts), size**-0.5),
                1 if DRY else 4,
            )


def experts(d: int, hidden: int, count: int, k: int, batch: int) -> None:
    up, down, x = bf16(count, hidden, d), bf16(count, d, hidden), bf16(batch, d)
    picked = torch.stack([torch.randperm(count, device=DEVICE)[:k] for _ in range(batch)])
    weights, default = torch.rand(batch, k, device=DEVICE), moe.blocks
    for tile in tried(EXPERTS[batch * k >= 64 * count]):

        def tiles(*words, tile=tile):
            rows_per, columns_per, inner, warps, stages = tile
            sizes = {"rows_per_block": rows_per, "columns_per_block": columns_per, "inner_per_step": inner}
            return {**default(*words), **sizes, **({} if DRY else {"num_warps": warps, "num_stages": stages})}

        with changed(moe, blocks=tiles):
            measure(
                f"experts d{d} h{hidden} {k} of {count} B{batch} {tile}",
                lambda _: sum_experts(x, weights, picked, up, None, down, "gelu"),
                1 if DRY else 2,
            )


def compose(d: int, atoms: int, k: int, batch: int) -> None:
    u, v, x, gamma = bf16(atoms, d), bf16(atoms, d), bf16(batch, d), torch.rand(d, device=DEVICE)
    groups = -(-atoms // 16)
    logits = torch.full((batch, groups * 16), -1e9, device=DEVICE)
    logits[:, :atoms] = torch.randn(batch, atoms, device=DEVICE)
    maxima = logits.view(batch, groups, 16).amax(2).contiguous()
    default = select_compose.blocks
    for warps, step in tried(COMPOSE):

        def tiles(*words, warps=warps, step=step):
            meta = default(*words)
            return {**meta, "num_warps": warps, "d_per_step": step} if warps and not DRY else meta

        with changed(select_compose, blocks=tiles):
            measure(
                f"select_compose d{d} M{atoms} K{k} B{batch} {(warps, step) if warps else 'default'}",
                lambda _: compose_rows(logits[:, :atoms], maxima, x, u, v, gamma, x, k),
                1 if DRY else 4,
            )


def run(family: str) -> None:
    if DRY:
        {
            "route": lambda: route(64, 50, 1, 1),
            "attend": lambda: attend(2, 2, 32, [40, 70], "dry"),
            "experts": lambda: experts(64, 48, 4, 2, 2),
            "compose": lambda: compose(64, 100, 4, 2),
        }[family]()
    elif family == "route":
        for batch in (1, 16, 64, 256):
            route(4096, 16384, batch, 2)
        for batch in (1, 64):
            route(384, 1523, batch, 60)
    elif family == "attend":
        attend(8, 4, 128, [8192], "1 of 8k")
        attend(8, 4, 128, [8192] * 16, "16 of 8k")
        attend(8, 4, 128, [2048] * 64, "64 of 2k")
        attend(8, 4, 128, [256] * 63 + [32768], "63 short, one of 32k")
        attend(6, 1, 64, [256] * 64, "the paper's, 64 of 256")
    elif family == "experts":
        for batch in (1, 16, 256, 2048):
            experts(4096, 8192, 4, 2, batch)
    elif family == "compose":
        for batch in (16, 64, 256):
            compose(4096, 16384, 32, batch)
        compose(384, 1523, 4, 64)
    else:
        sys.exit(f"{family} is not a family: route, attend, experts, compose")


with torch.inference_mode():
    for family in FAMILIES:
        run(family)
if not WARM:
    table("tiles", ["what", "us"], rows)
    RESULTS["tune"] = rows
    save("tune")
say("tune: measured")
