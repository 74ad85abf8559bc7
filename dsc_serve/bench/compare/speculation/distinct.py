"""How many distinct experts, adapters or atoms a step reads, by its width: what drafts cost is mostly these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dsc_kernels.weights import KvCache
from dsc_serve.bench.step.speculation import Task, fixed_engine
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.ffn.picks import Picks, picking_layers

STEPS = 6  # of each width


def distinct_rows(
    model: Decoder, config: EngineConfig, tasks: Sequence[Task], most: int
) -> dict[tuple[int, int], float]:
    """By streams and width, distinct picks of a layer in a step, on average; empty where the model picks nothing."""
    if not picking_layers(model.config)[1]:
        return {}
    return {
        (task.streams, width): found
        for task in tasks
        for width in range(most + 1)
        if (found := _distinct(model, config, task, width)) is not None
    }


def _distinct(model: Decoder, config: EngineConfig, task: Task, width: int) -> float | None:
    short = Task(task.streams, task.prompt_tokens, min(task.tokens, STEPS * (width + 1) + 2), 0.0)
    scripts = short.scripts(model.config.vocab_size)
    engine = fixed_engine(model, config, short, width, scripts)
    with _picks_of(model) as steps:
        _run(engine, short, scripts)
    rows = task.streams * (width + 1)
    counts = [len(set(own.atoms.flatten().tolist())) for step in steps for own in step if own.atoms.shape[0] == rows]
    return sum(counts) / len(counts) if counts else None


@contextmanager
def _picks_of(model: Decoder) -> Iterator[list[list[Picks]]]:
    """Of each step that the model computes meanwhile, what its layers pick."""
    steps: list[list[Picks]] = []

    def hidden(batch: StepBatch, kv_caches: Sequence[KvCache], _: object = None) -> Tensor:
        own: list[Picks] = []
        out = type(model).hidden(model, batch, kv_caches, own)
        steps.append([Picks(*(part.clone() for part in one)) for one in own])
        return out

    model.__dict__["hidden"] = hidden
    try:
        yield steps
    finally:
        del model.__dict__["hidden"]


def _run(engine: Engine, task: Task, scripts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(task.prompts(engine.capacity.vocab_size)):
        engine.add(str(i), prompt, task.params(i, scripts[i]))
    while engine.has_work:
        engine.step()
