"""How fast: one FFN layer of each kind, and DSC's parts, from captured graphs: microseconds beside the floor.

Layers of different weights follow each other in one graph, so that no weight is found in the L2 cache. The floor is the
bytes that must be read or the products that must be made, whichever takes longer, part by part, at rates measured here.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from common import DEVICE, DRY, RESULTS, graph, left_s, save, say, table, time_us
from internals import (
    ModelConfig,
    compose,
    decoder_layers,
    ffn_layer,
    ops,
    route_logits,
    router_weight,
    run_experts,
    select_and_compose,
    served,
)
from internals import layers as kernels
from models import config, decoder

SIZES = os.environ.get("SIZES", "paper" if DRY else "paper,big").split(",")
BATCHES = [3] if DRY else [int(batch) for batch in os.environ.get("BATCHES", "1,16,64,256,1024").split(",")]
COPIES = {"paper": 2 if DRY else 40, "big": 2 if DRY else 3}
Job = Callable[[object], object]


def bandwidth() -> float:
    """Bytes per second of a copy."""
    if DRY:
        return 1e12
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    return 2e6 * source.nbytes / time_us(lambda: target.copy_(source))


def product_rate() -> float:
    """FLOPs per second of a large product in bfloat16."""
    if DRY:
        return 1e12
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2e6 * 8192**3 / time_us(lambda: a @ b)


def floor_us(made: ModelConfig, batch: int, bytes_s: float, flops_s: float) -> float:
    ffn, d = made.ffn, made.hidden_size

    def distinct(count: int, picks: int) -> float:
        return count * (1 - (1 - picks / count) ** batch)

    if ffn.kind == "dsc":
        count, k = ffn.num_atoms, ffn.atoms_per_token
        parts = [(2 * count, 2 * batch * count), (4 * ffn.static_size, 4 * batch * ffn.static_size)]
        parts.append((4 * distinct(count, k), 4 * batch * k))
    elif ffn.kind == "molora":
        count, k = ffn.num_adapters, ffn.adapters_per_token
        parts = [(2 * count, 2 * batch * count), (4 * ffn.static_size, 4 * batch * ffn.static_size)]
        parts.append((4 * distinct(count, k) * ffn.rank, 4 * batch * k * ffn.rank))
    elif ffn.kind == "moe":
        width, k = ffn.expert_size, ffn.experts_per_token
        parts = [(4 * distinct(ffn.num_experts, k) * width, 4 * batch * k * width)]
    else:
        parts = [(4 * ffn.size, 4 * batch * ffn.size)]
    return sum(max(read * d / bytes_s, flops * d / flops_s) for read, flops in parts) * 1e6


def dsc_jobs(layer, x: torch.Tensor, k: int) -> dict[str, Job]:
    """DSC as it is served, and its parts on inputs made once."""
    picks = torch.zeros(len(x), k, dtype=torch.int32, device=DEVICE)
    signal = torch.zeros(len(x), device=DEVICE)
    logits, maxima = route_logits(layer, x)
    atoms, weights, _ = kernels.select(logits, maxima, k, 1e-6)
    static = layer.static(x)
    jobs: dict[str, Job] = {
        "dsc as served (picks written)": lambda own: served(own, x, picks, signal),
        "  route": lambda own: route_logits(own, x),
        "  static": lambda own: own.static(x),
        "  select": lambda own: kernels.select(logits, maxima, k, 1e-6),
        "  select_compose": lambda own: select_and_compose(own, logits, maxima, x, static),
        "  contract and expand": lambda own: compose(own, x, atoms, weights, static),
    }
    if not DRY:
        side = torch.cuda.Stream()

        def beside(own) -> torch.Tensor:
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                picked, scale, _ = kernels.select(*route_logits(own, x), k, 1e-6)
            out = own.static(x)
            main.wait_stream(side)
            return compose(own, x, picked, scale, out)

        jobs["  router as cuBLAS mm"] = lambda own: torch.mm(x, router_weight(own).T, out_dtype=torch.float32)
        jobs["dsc, router beside static"] = beside
    return jobs


def moe_jobs(layer, x: torch.Tensor) -> dict[str, Job]:
    weights, experts = layer.route(x)
    weights = weights.contiguous()
    return {
        "  moe routing": lambda own: own.route(x),
        "  moe experts, routing given": lambda own: run_experts(own, x, weights, experts),
    }


@torch.inference_mode()
def rows_of(size: str, bytes_s: float, flops_s: float) -> list[list[object]]:
    kinds = ("dsc", "moe", "dense", "molora") if size == "paper" else ("dsc", "moe", "dense")
    configs = {kind: config(size, kind, 64, COPIES[size], vocab_size=64) for kind in kinds}
    models = {kind: decoder(made) for kind, made in configs.items()}  # they own the weights
    owned = {kind: [ffn_layer(layer) for layer in decoder_layers(model)] for kind, model in models.items()}
    rows: list[list[object]] = []
    for batch in BATCHES:
        if left_s() < 12:
            say("no time left for", size, batch)
            break
        x = torch.randn(batch, configs["dsc"].hidden_size, device=DEVICE).bfloat16()
        for kind in kinds:
            jobs: dict[str, Job] = {kind: lambda own, x=x: own(x, x)}
            if kind == "dsc":
                jobs |= dsc_jobs(owned[kind][0], x, configs[kind].ffn.atoms_per_token)
            elif kind == "moe":
                jobs |= moe_jobs(owned[kind][0], x)
            for name, job in jobs.items():
                try:
                    found = time_us(
                        graph(lambda job=job, kind=kind: [job(own) for own in owned[kind]]), len(owned[kind])
                    )
                except Exception as error:  # one part that fails costs only its row, unless this is the rehearsal
                    if DRY:
                        raise
                    say(name, type(error).__name__, str(error)[:200])
                    continue
                least = floor_us(configs[kind], batch, bytes_s, flops_s)
                rows.append([batch, name, found, *(("", "") if name.startswith("  ") else (least, found / least))])
                RESULTS.setdefault(size, []).append(rows[-1])
        save("layers")
    return rows


if DRY:
    ops.use("triton")
rates = bandwidth(), product_rate()
say(f"copy {rates[0] / 1e12:.2f} TB/s, bfloat16 product {rates[1] / 1e12:.0f} TFLOP/s")
RESULTS["rates"] = rates
for size in SIZES:
    table(f"{size}: microseconds a layer", ["batch", "what", "us", "floor", "times"], rows_of(size, *rates))
    if not DRY:
        torch.cuda.empty_cache()
say("layers: measured")
