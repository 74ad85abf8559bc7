"""Is it right: the reference script's own greedy ids, alone and batched, in float32; bfloat16 must be near."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from common import DEVICE, DRY, REPO, distance, say
from internals import ffn_kinds, graph_sizes, import_reference
from safetensors.torch import load_file

from dsc_serve import LLM, SamplingParams

DATA = REPO / "tests" / "data"
METHODS = ("dsc",) if DRY else ("dsc", "standard_moe", "dense")
SIZES = {"kv_tokens": 4096, "max_running": 8}


def shared(ones: list[list[int]], others: list[list[int]]) -> float:
    """The share of tokens that are the same."""
    return sum(a == b for x, y in zip(ones, others, strict=True) for a, b in zip(x, y, strict=False)) / sum(
        map(len, others)
    )


def check(method: str, folder: Path) -> bool:
    import_reference(DATA / f"{method}.weights.safetensors", DATA / f"{method}.config.json", folder)
    kept = load_file(DATA / f"{method}.io.safetensors")
    greedy, wanted_logits = kept["greedy_ids"], kept["logits"]
    middle = greedy.shape[1] // 2
    prompts, want = greedy[:, :middle].tolist(), greedy[:, middle:].tolist()
    params = SamplingParams(temperature=0, max_tokens=middle)
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=middle)
    with LLM(str(folder), device=DEVICE.type, dtype="float32", **SIZES) as llm:
        batched = [output.token_ids for output in llm.generate(prompts, params)]
        alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
        error = distance(torch.stack(llm.logits(kept["input_ids"].tolist())), wanted_logits)
        sampled = [output.token_ids for output in llm.generate(prompts, drawn)]
        say(method, "layers", ffn_kinds(llm.engine.runner), "graphs", graph_sizes(llm.engine.runner))
    right = batched == want and alone == want and error < 1e-4
    say(
        method,
        f"greedy batched {batched == want}, alone {alone == want}, logits error {error:.1e}",
        "OK" if right else "WRONG",
    )
    if not DRY:
        with LLM(str(folder), dtype="float32", kernels="plain", **SIZES) as cpu:
            there = [output.token_ids for output in cpu.generate(prompts, drawn)]
        say(method, f"sampled with one seed: {shared(sampled, there):.0%} of tokens as on the CPU")
    with LLM(str(folder), device=DEVICE.type, dtype="bfloat16", **SIZES) as llm:
        error = distance(torch.stack(llm.logits(kept["input_ids"].tolist())), wanted_logits)
        ids = [output.token_ids for output in llm.generate(prompts, params)]
    say(method, f"bfloat16: logits error {error:.1e} (near ties flip atoms), greedy ids equal {shared(ids, want):.0%}")
    return right and error < 0.2


with tempfile.TemporaryDirectory() as root:
    wrong = [method for method in METHODS if not check(method, Path(root) / method)]
say("golden:", f"WRONG: {wrong}" if wrong else "OK")
sys.exit(bool(wrong))
