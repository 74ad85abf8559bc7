"""Compiles the router's tiles and those that score rows again, and tells with what they multiply, as JSON.

A script, since it cannot share a process with interpreted kernels; its arguments are targets.
"""

from __future__ import annotations

import itertools
import json
import re
import sys

import torch

from dsc_kernels import aot
from dsc_kernels.gpu import ffn_in, rescore
from dsc_kernels.gpu.compiler import tuned_for

PRODUCTS = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|v_mfma)[\w.:]*")
FUSED = re.compile(r"\bfma\.rn\.f32\b|\bv_(?:pk_)?fma(?:c)?_f32\w*")
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
D, ATOMS, HIDDEN = 384, 1523, 320


def findings(target: str) -> dict[str, list[list[str]]]:
    """{case: instructions of the exact tile, of the one that scores again}."""
    found = {}
    for (dtype, t), batch, beside in itertools.product(POINTERS.items(), (1, 16, 17, 32), (False, True)):
        tiles = ffn_in.blocks(batch, ATOMS + HIDDEN * beside, dtype, beside)
        types = {**dict.fromkeys(("x", "router"), t), "counts": "*i64", "lowest": "*fp32"}
        types |= dict.fromkeys(("router_bias", "rstd", "logits", "maxima"), "*fp32")
        none = dict.fromkeys(("up", "up_bias", "gate", "gate_bias", "hidden", "levels", "scales", "errors", "length"))
        exact = aot.Job("", ffn_in.route_and_raise, {**tiles, **none, "d": D, "activation": "none"}, types)
        meta = rescore.rescore_blocks(batch, ATOMS, -(-ATOMS // ffn_in.GROUP), 4, tiles)
        again = aot.Job("", rescore.rescore_rows, {**meta, "d": D}, types)
        codes = [aot.compile_job(job, target).asm for job in (exact, again)]
        texts = [code["amdgcn" if "amdgcn" in code else "ptx"] for code in codes]
        names = [sorted(set(PRODUCTS.findall(text))) or ["fma"] * bool(FUSED.search(text)) for text in texts]
        found[f"{t} {batch} {'beside' if beside else 'alone'}"] = names
    return found


if __name__ == "__main__":
    told = {}
    for target in sys.argv[1:]:
        with tuned_for(amd=target.startswith("gfx")):
            told[target] = findings(target)
    print(json.dumps(told))
