"""One model from inside: what it is, where a decode step's time goes, and the bytes of weights that a step reads.

Run as a process of its own (`python -m dsc_serve.bench.step.inspect_model`), so that a comparison's client stays free
of torch.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.bench.compare.peer_model import describe_foreign
from dsc_serve.bench.layer.roofline import phases, screened
from dsc_serve.bench.step.least import screens_head, screens_router
from dsc_serve.bench.step.profile import PROMPT_TOKENS, context_needed, profile
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.model.decoder import Decoder, parameter_counts, tensor_shapes
from dsc_serve.sampling_params import SamplingParams

TIMED_STEPS = 40
ROUTED_STEPS = 8  # whose inputs to the FFNs are looked at
SHOWN = {
    "norms": ("norms",),
    "attention": ("projections", "kv writes", "attention"),
    "ffn": ("router", "compose", "static", "experts", "ffn waiting"),
    "head": ("head",),
}  # parts of a step's profile by what they are called here


class RecordingFfn:
    """Stands in for an FFN; `seen` is the input of its last call."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        self.seen = x
        return self.inner(x, *arguments, **options)


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
        tensors = open_source(folder).tensors
        self._config = config
        self._stored = {name: tensors[name].read().float() for name in tensors if ".mlp.router" in name}

    def distinct(self, layer: int, x: Tensor) -> int:
        """Different atoms, adapters or experts that tokens x [B, d] pick."""
        at, c = f"model.layers.{layer}.mlp.", self._config.layers[layer]
        x = x.float()
        if f"{at}router_norm.weight" in self._stored:
            norm = self._stored[f"{at}router_norm.weight"], self._stored[f"{at}router_norm.bias"]
            x = F.layer_norm(x, x.shape[-1:], *norm, c.norm_eps)
        logits = F.linear(x, self._stored[f"{at}router.weight"], self._stored.get(f"{at}router.bias"))
        return len(set(logits.topk(picks_per_token(c), dim=-1).indices.flatten().tolist()))


def bytes_read(
    config: ModelConfig, running: int, distinct: float, element: int, *, int8_router: bool, int8_head: bool
) -> dict[str, float]:
    """Bytes of weights that a greedy decode step reads at least, by part, all layers together."""
    c, d, layers = config, config.hidden_size, config.num_hidden_layers
    read: dict[str, float] = {}
    for layer in c.layers:
        own = phases(layer, running, distinct, element)
        for phase in screened(own, element) if int8_router else own:
            read[phase.name] = read.get(phase.name, 0.0) + phase.bytes
    attention = layers * c.projected * d * element
    return read | {"attention": attention, "head": c.vocab_size * d * (1 if int8_head else element)}


@torch.inference_mode()
def decode_step(model: Decoder, folder: Path, config: EngineConfig, running: int) -> dict[str, object]:
    """Milliseconds of a decode step of `running` requests by part, means, and its bytes of weights."""
    parts = {p.name: p.us / 1e3 for p in profile(model, config, None, running, "greedy", TIMED_STEPS).parts}
    times = {name: sum(parts.pop(part, 0.0) for part in own) for name, own in SHOWN.items()}
    times |= {"rest": sum(parts.values()), "step": sum(times.values()) + sum(parts.values())}
    routed = any(picks_per_token(layer) for layer in model.config.layers)
    distinct = picked(model, folder, config, running) if routed else 0.0
    int8 = {"int8_router": screens_router(model, running), "int8_head": screens_head(model)}
    return {
        "milliseconds": {name: round(time, 4) for name, time in times.items()},
        "distinct": round(distinct, 2),
        "bytes": bytes_read(model.config, running, distinct, model.dtype.itemsize, **int8),
    }


def picked(model: Decoder, folder: Path, config: EngineConfig, running: int) -> float:
    """Mean over layers and decode steps of the different atoms, adapters or experts that `running` requests pick."""
    parts: Any = model
    stack, ffns = model.stack, [RecordingFfn(layer.ffn) for layer in model.layers]
    model.stack = None  # block by block, so that every FFN's input is seen
    if model.embedding is None:  # the stack's own
        model.embedding = open_source(folder).stored_weights()["model.embed_tokens.weight"].to(model.dtype)
    for layer, ffn in zip(parts.layers, ffns, strict=True):
        layer.ffn = ffn
    try:
        engine = Engine.for_model(model, config)
        start_decoding(engine, model.config.vocab_size, running, ROUTED_STEPS)
        routers, counts = Routers(folder, model.config), list[int]()
        routed = [i for i, layer in enumerate(model.config.layers) if picks_per_token(layer)]
        for _ in range(ROUTED_STEPS):
            engine.step()
            counts += [routers.distinct(i, seen) for i in routed if (seen := ffns[i].seen) is not None]
        return statistics.mean(counts)
    finally:
        model.stack = stack
        for layer, ffn in zip(parts.layers, ffns, strict=True):
            layer.ffn = ffn.inner


def start_decoding(engine: Engine, vocabulary: int, running: int, steps: int) -> None:
    """Give the engine so many requests and bring them to where each step adds a token to each, for `steps` steps."""
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=steps + PROMPT_TOKENS + running, ignore_eos=True)
    for i in range(running):
        engine.add(str(i), [rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)], params)
    while engine.scheduler.waiting or any(request.num_uncomputed > 1 for request in engine.scheduler.running.values()):
        engine.step()


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


def inspect_folder(folder: Path, running: tuple[int, ...], threads: int, router: str) -> dict[str, object]:
    """What a folder of ours holds, and its steps by the number of running requests."""
    # the whole prompt of every request in one step at most, and room for all that is generated
    config = EngineConfig(
        model=str(folder),
        threads=threads,
        router_precision=router,  # type: ignore[arg-type]
        max_running=max(running, default=1),
        kv_tokens=max(running, default=1) * (context_needed(TIMED_STEPS) + PROMPT_TOKENS) + 1024,
    )
    model = prepare_model(config)
    steps = {str(count): decode_step(model, folder, config, count) for count in running}
    return {"description": describe(model), "steps": steps, "torch": torch.__version__}


@click.command()
@click.argument("model")
@click.option("--running", type=int, multiple=True)
@click.option("--threads", default=0)
@click.option("--router", default="auto")
@click.option("--foreign", is_flag=True, help="A model of another server: only what it is.")
def main(model: str, running: tuple[int, ...], threads: int, router: str, foreign: bool) -> None:
    found: dict[str, object]
    if foreign:
        found = {"description": describe_foreign(Path(model)), "steps": {}, "torch": ""}
    else:
        found = inspect_folder(resolve_model(model), running, threads, router)
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
