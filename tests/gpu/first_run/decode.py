"""How fast: whole models of random weights: the captured step (device), the engine's (wall), prompts of new lengths."""

from __future__ import annotations

import gc
import os
import statistics
import time

import torch
from common import DRY, RESULTS, left_s, save, say, sync, table, time_us
from internals import (
    SamplingParams,
    argmax_tokens,
    bucket,
    copy_inputs,
    fill,
    graph_sizes,
    is_prefilling,
    make_engine,
    make_runner,
    replay,
    running_ids,
)
from models import config, decoder

SIZES = os.environ.get("SIZES", "paper,big").split(",")
KINDS = os.environ.get("KINDS", "dsc,moe,dense").split(",")
BATCHES = [1, 3] if DRY else [1, 16, 64, 256]
CONTEXTS = [40] if DRY else [128, 1024]
CONTEXT = 128 if DRY else 2048
STEPS = 5 if DRY else 60
LENGTHS = [10, 11] if DRY else [100 + more for more in range(6)]
STEP_COLUMNS = ["kind", "batch", "context", "graph with its head", "a head", "engine step (short contexts)"]
PROMPT_COLUMNS = ["kind", "new lengths", "worst", "same again", "16 of 31 at once", "new, no cuDNN", "worst"]


def graph_rows(runner, kind: str) -> list[list[object]]:
    """Device microseconds of a captured step, head and argmax in it, and of these alone, by batch and context."""
    rows = []
    for batch in BATCHES:
        for context in CONTEXTS:
            fill(runner, [context] * batch)
            padded = bucket(runner, batch)
            copy_inputs(runner, padded)
            step = time_us(lambda padded=padded: replay(runner, padded))
            hidden = replay(runner, padded)[:batch]
            rows.append(
                [kind, batch, context, step, time_us(lambda hidden=hidden: argmax_tokens(runner.model, hidden))]
            )
    return rows


def step_us(engine, batch: int) -> float:
    """Median wall microseconds of the engine's step with so many running, host and all."""
    params = SamplingParams(temperature=0, max_tokens=CONTEXT - 20, ignore_eos=True)
    for number in range(batch):
        engine.add(f"step{batch}-{number}", [7] * 16, params)
    while is_prefilling(engine):
        engine.step()
    times = []
    for _ in range(10 + STEPS):
        start = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - start) * 1e6)
    for name in running_ids(engine):
        engine.finish(name)
    return statistics.median(times[10:])


def prompts_ms(engine, lengths: list[int], tag: str, together: bool = False) -> list[float]:
    """Wall milliseconds of each prompt by itself, or of all of them at once."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    found = []
    for group in [lengths] if together else [[length] for length in lengths]:
        for number, length in enumerate(group):
            engine.add(f"{tag}-{len(found)}-{number}", [5] * length, params)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        sync()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def prompt_row(engine, kind: str) -> list[object]:
    new = prompts_ms(engine, LENGTHS, "new")
    again = prompts_ms(engine, LENGTHS, "again")
    (many,) = prompts_ms(engine, [31] * (2 if DRY else 16), "many", together=True)
    row = [kind, statistics.median(new), max(new), statistics.median(again), many]
    torch.backends.cuda.enable_cudnn_sdp(False)  # which makes a plan for every new shape
    without = prompts_ms(engine, [length + 100 for length in LENGTHS] if not DRY else [12, 13], "without")
    torch.backends.cuda.enable_cudnn_sdp(True)
    return [*row, statistics.median(without), max(without)]


def measured(size: str, kind: str) -> tuple[list[list[object]], list[object]]:
    start = time.monotonic()
    model = decoder(config(size, kind, CONTEXT))
    sync()
    made = time.monotonic()
    runner = make_runner(model, max(BATCHES), CONTEXT)
    sync()
    allocated = 0 if DRY else torch.cuda.memory_allocated()
    say(
        f"{size} {kind}: made in {made - start:.1f} s, {len(graph_sizes(runner))} graphs in "
        f"{time.monotonic() - made:.1f} s, {allocated / 1e9:.1f} GB allocated"
    )
    with torch.inference_mode():
        rows = graph_rows(runner, kind)
    engine = make_engine(runner, max(BATCHES), CONTEXT)
    for batch in BATCHES:
        next(row for row in rows if row[1] == batch).append(step_us(engine, batch))
    return rows, prompt_row(engine, kind)


for size in SIZES:
    steps: list[list[object]] = []
    prompts: list[list[object]] = []
    for kind in KINDS:
        if left_s() < 25:
            say("no time left for", size, kind)
            continue
        rows, prompt = measured(size, kind)
        steps += [[*row, *[""] * (len(STEP_COLUMNS) - len(row))] for row in rows]
        prompts.append(prompt)
        RESULTS.setdefault(size, {})[kind] = {"steps": rows, "prompts": prompt}
        save("decode")
        gc.collect()
        if not DRY:
            torch.cuda.empty_cache()
    table(f"{size}: microseconds of a step", STEP_COLUMNS, steps)
    table(f"{size}: milliseconds of a prompt of about 100 tokens", PROMPT_COLUMNS, prompts)
say("decode: measured")
