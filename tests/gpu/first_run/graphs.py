"""Is it right: every captured size against the same step computed eagerly, with other inputs, and padded."""

from __future__ import annotations

import sys
import time

import torch
from common import DEVICE, DRY, distance, say, sync
from internals import (
    argmax_tokens,
    copy_inputs,
    drawn,
    eager,
    fill,
    fill_caches,
    graph_sizes,
    has_head,
    make_runner,
    pad,
    replay,
)
from models import config, decoder

CONTEXT, RUNNING = (64, 4) if DRY else (1024, 128)
GROUPED = {"num_key_value_heads": 2, "position_embedding_type": "rope"}


@torch.inference_mode()
def check(kind: str, changes: dict[str, object]) -> bool:
    model = decoder(config("paper", kind, CONTEXT, **changes))
    start = time.monotonic()
    runner = make_runner(model, RUNNING, CONTEXT)
    sync()
    took = time.monotonic() - start
    fill_caches(runner, torch.Generator(DEVICE).manual_seed(1))
    errors, words = [], []
    for size in graph_sizes(runner):
        got = None
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed * 1000 + size)
            fill(runner, torch.randint(1, CONTEXT + 1, (size,), generator=generator).tolist(), seed)
            want = eager(runner, size).clone()
            copy_inputs(runner, size)
            got = replay(runner, size).clone()
            sync()
            errors.append(distance(got, want))
            if has_head(runner, size):  # of one word among thousands, near ties may fall either way
                words.append(float((drawn(runner, size) == argmax_tokens(model, got)).float().mean()))
        if size > 2:  # padded: one row fewer
            pad(runner, size - 1, size)
            copy_inputs(runner, size)
            part = replay(runner, size)[: size - 1].clone()
            sync()
            errors.append(distance(part, got[: size - 1]))
    right = max(errors) < 2e-2 and min(words, default=1.0) > 0.9
    memory = 0 if DRY else torch.cuda.memory_reserved() >> 20
    say(
        f"{kind} {changes or ''}: {len(graph_sizes(runner))} graphs in {took:.1f} s, equal bit for bit in",
        f"{errors.count(0.0)} of {len(errors)}, worst {max(errors):.1e}, the same words in {words.count(1.0)} of",
        f"{len(words)}, reserved {memory} MiB",
        "OK" if right else "WRONG",
    )
    return right


wrong = []
for kind, changes in (("dsc", {}), ("moe", {}), ("dense", {}), ("molora", {}), ("dsc", GROUPED)):
    if not check(kind, changes):
        wrong.append((kind, changes))
    if not DRY:
        torch.cuda.empty_cache()
say("graphs:", f"WRONG: {wrong}" if wrong else "OK")
sys.exit(bool(wrong))
