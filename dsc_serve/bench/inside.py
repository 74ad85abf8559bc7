"""One model from inside: what it is, where a decode step's time goes, and the bytes of weights that a step reads.

Run as a process of its own (`python -m dsc_serve.bench.inside`), so that a comparison's client stays free of torch.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from dsc_kernels import native
from dsc_serve.bench.peer_model import FORMS, peer_counts
from dsc_serve.bench.roofline import phases, screened
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.engine.engine import Engine, prepare_model
from dsc_serve.model.checkpoint import weight_files
from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.model.decoder import Decoder, parameter_counts, tensor_shapes
from dsc_serve.sampling_params import SamplingParams

PROMPT_TOKENS = 48
WARM_STEPS, TIMED_STEPS = 10, 60
ROUTED_STEPS = 8  # whose inputs to the FFNs are looked at


class Clock:
    """Seconds by part of a step, since they were last taken."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def take(self) -> dict[str, float]:
        taken, self.spent = self.spent, defaultdict(float)
        return taken


class Timed:
    """Stands in for a part of a model and times its calls; `seen` is the input of the last one."""

    def __init__(self, clock: Clock, part: str, inner: Any) -> None:
        self._clock, self._part, self._inner = clock, part, inner
        self.seen: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        return self._timed(self._inner, x, *arguments, **options)

    def largest(self, x: Tensor) -> Any:
        return self._timed(self._inner.largest, x)

    def _timed(self, call: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
        self.seen = x
        start = time.perf_counter()
        result = call(x, *arguments, **options)
        self._clock.spent[self._part] += time.perf_counter() - start
        return result


def watched(model: Decoder, clock: Clock) -> list[Timed]:
    """Time the model's parts from now on; returns the FFNs."""
    parts: Any = model
    ffns = []
    for block in parts.blocks:
        block.norm1, block.norm2 = Timed(clock, "norms", block.norm1), Timed(clock, "norms", block.norm2)
        block.attention = Timed(clock, "attention", block.attention)
        ffns.append(Timed(clock, "ffn", block.ffn))
        block.ffn = ffns[-1]
    parts.norm, parts.head = Timed(clock, "norms", parts.norm), Timed(clock, "head", parts.head)
    return ffns


def picks_per_token(config: ModelConfig) -> int:
    ffn = config.ffn
    if isinstance(ffn, DscConfig):
        return ffn.atoms_per_token
    if isinstance(ffn, MoloraConfig):
        return ffn.adapters_per_token
    return ffn.experts_per_token if isinstance(ffn, MoeConfig) else 0


class Routers:
    """The stored routers of every layer: what inputs of the FFNs pick."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._config, self._stored = config, dict[str, Tensor]()
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if ".mlp.router" in name]  # noqa: SIM118
                self._stored |= {name: tensors.get_tensor(name).float() for name in names}

    def distinct(self, layer: int, x: Tensor) -> int:
        """Different atoms, adapters or experts that tokens x [B, d] pick."""
        at, c = f"model.layers.{layer}.mlp.", self._config
        x = x.float()
        if f"{at}router_norm.weight" in self._stored:
            norm = self._stored[f"{at}router_norm.weight"], self._stored[f"{at}router_norm.bias"]
            x = F.layer_norm(x, x.shape[-1:], *norm, c.norm_eps)
        logits = F.linear(x, self._stored[f"{at}router.weight"], self._stored.get(f"{at}router.bias"))
        return len(set(logits.topk(picks_per_token(c), dim=-1).indices.flatten().tolist()))


def bytes_read(config: ModelConfig, running: int, distinct: float, element: int, int8: bool) -> dict[str, float]:
    """Bytes of weights that a decode step reads at least, by part, all layers together."""
    c, d, layers = config, config.hidden_size, config.num_hidden_layers
    ffn = phases(c, running, distinct, element)
    if int8:
        ffn = screened(ffn, element)
    read = {phase.name: layers * phase.bytes for phase in ffn}
    attention = layers * (2 * c.query_size + 2 * c.kv_size) * d * element
    return read | {"attention": attention, "head": c.vocab_size * d * element}


@torch.inference_mode()
def decode_step(model: Decoder, folder: Path, config: EngineConfig, running: int) -> dict[str, object]:
    """Milliseconds of a decode step of `running` requests by part, medians, and its bytes of weights."""
    engine, clock = Engine.for_model(model, config), Clock()
    rng = random.Random(0)
    steps = WARM_STEPS + TIMED_STEPS + ROUTED_STEPS
    for i in range(running):
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(PROMPT_TOKENS)]
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=steps + running, ignore_eos=True))
    while any(request.computed < PROMPT_TOKENS for request in engine.scheduler.running.values()) or (
        len(engine.scheduler.running) < running
    ):
        engine.step()
    plain = [(block.norm1, block.attention, block.norm2, block.ffn) for block in model.blocks]
    ends = model.norm, model.head
    ffns = watched(model, clock)
    try:
        for _ in range(WARM_STEPS):
            engine.step()
        clock.take()
        samples: dict[str, list[float]] = defaultdict(list)
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - start
            parts = clock.take()
            for part, seconds in (parts | {"rest": whole - sum(parts.values()), "step": whole}).items():
                samples[part].append(seconds)
        distinct = 0.0
        if not isinstance(model.config.ffn, DenseConfig):
            routers, counts = Routers(folder, model.config), list[int]()
            for _ in range(ROUTED_STEPS):
                engine.step()
                counts += [routers.distinct(i, ffn.seen) for i, ffn in enumerate(ffns) if ffn.seen is not None]
            distinct = statistics.mean(counts)
    finally:
        for block, own in zip(model.blocks, plain, strict=True):
            block.norm1, block.attention, block.norm2, block.ffn = own
        model.norm, model.head = ends
    int8 = isinstance(model.config.ffn, DscConfig) and native.router_precision() == "int8-certified"
    return {
        "milliseconds": {part: round(1e3 * statistics.median(times), 4) for part, times in samples.items()},
        "distinct": round(distinct, 2),
        "bytes": bytes_read(model.config, running, distinct, model.dtype.itemsize, int8),
    }


def describe(model: Decoder) -> dict[str, object]:
    """What a model of ours is."""
    config = model.config
    total, active = parameter_counts(config)
    stored = sum(torch.Size(shape).numel() for name, shape in tensor_shapes(config).items() if ".mlp." in name)
    fields = ", ".join(
        f"{name} {value}" for name, value in config.ffn.model_dump().items() if isinstance(value, int | float)
    )
    return {
        "ffn": f"{config.ffn.kind}: {fields}",
        "frame": f"{config.num_hidden_layers} layers, d {config.hidden_size}, vocabulary {config.vocab_size}",
        "parameters": total,
        "active": active,
        "ffn_bytes": stored * model.dtype.itemsize,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def look_inside(folder: Path, running: tuple[int, ...], threads: int, router: str) -> dict[str, object]:
    """What a model folder holds and, where the model is ours, its steps by the number of running requests."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content.get("model_type") in FORMS:
        return {"description": peer_counts(content), "steps": {}, "torch": torch.__version__}
    # the whole prompt of every request in one step at most, and room for all that is generated
    config = EngineConfig(
        model=str(folder),
        threads=threads,
        router_precision=router,  # type: ignore[arg-type]
        max_running=max(running, default=1),
        kv_tokens=max(running, default=1) * 4 * PROMPT_TOKENS + 1024,
    )
    model = prepare_model(config)
    steps = {str(count): decode_step(model, folder, config, count) for count in running}
    return {"description": describe(model), "steps": steps, "torch": torch.__version__}


@click.command()
@click.argument("model")
@click.option("--running", type=int, multiple=True)
@click.option("--threads", default=0)
@click.option("--router", default="auto")
def main(model: str, running: tuple[int, ...], threads: int, router: str) -> None:
    click.echo(json.dumps(look_inside(resolve_model(model), running, threads, router)))


if __name__ == "__main__":
    main()
