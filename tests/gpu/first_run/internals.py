"""All that these scripts use from inside dsc_serve and dsc_kernels: a rename there is followed in this file alone."""

from __future__ import annotations

import torch
from common import CPU, DEVICE, DRY
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.gpu import add_norm, attention, ffn_in, layers, moe, select_compose
from dsc_kernels.plan import Planner
from dsc_kernels.weights import AtomBank, FfnOptions, KvCache, MlpWeights, MoeOptions, Router
from dsc_serve import SamplingParams
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.graph_budget import GraphKey
from dsc_serve.engine.graph_forms import FORMS, GREEDY
from dsc_serve.engine.graphs import CudaCapture
from dsc_serve.engine.runner import Runner
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder, dsc_layers, tensor_shapes
from dsc_serve.model.ffn.picks import picking_layers
from dsc_serve.model.initial import preset_config
from dsc_serve.model.reference import import_reference
from dsc_serve.sampling_params import EngineCapacity

__all__ = [
    "Chunk",
    "Decoder",
    "Engine",
    "ModelConfig",
    "Runner",
    "SamplingParams",
    "StepBatch",
    "attention",
    "dsc_layers",
    "ffn_in",
    "import_reference",
    "layers",
    "moe",
    "ops",
    "preset_config",
    "select_compose",
    "tensor_shapes",
]

BLOCK = 16
STEP_TOKENS = 512


class Again:
    """What a graph is on a CPU: it computes again."""

    def __init__(self, compute) -> None:
        self.compute, self.out = compute, compute()

    def replay(self) -> None:
        self.out.copy_(self.compute())


def capture():
    """How the runner captures its decode steps: as CUDA graphs, or dry."""
    if not DRY:
        return CudaCapture()

    def again(compute):
        made = Again(compute)
        return made, made.out

    return again


# A model's parts.


def decoder_layers(model: Decoder) -> list:
    return model.layers


def ffn_layer(layer):
    """The kernels' own layer in a decoder layer's FFN."""
    return layer.ffn.layer


def argmax_tokens(model: Decoder, hidden: Tensor) -> Tensor:
    return model.argmax_tokens(hidden)


def kv_caches(model: Decoder, blocks: int) -> list:
    return model.kv_caches(blocks, BLOCK)


def plan_dsc_layers(model: Decoder) -> None:
    """As the engine does when it loads a model."""
    for layer in dsc_layers(model):
        layer.planner = Planner("auto", layer.shape, None)


def ffn_kinds(runner: Runner) -> set[str]:
    """The modules whose layers serve."""
    return {type(ffn_layer(layer)).__module__ for layer in decoder_layers(runner.model)}


# Layers by themselves.


def make_dsc(up: Tensor, down: Tensor, weight: Tensor, u: Tensor, v: Tensor, k: int):
    d, atoms = up.shape[1], weight.shape[0]
    router = Router(weight, torch.zeros(atoms, device=DEVICE), 1e-5)
    options = FfnOptions(activation="gelu", k=k, tau=20.0, eps=1e-6)
    bank = AtomBank(u, v, torch.ones(d, device=DEVICE))
    return layers.Ffn(MlpWeights(up, None, down), options, router, bank)


def make_moe(weight: Tensor, up: Tensor, down: Tensor, experts: int, k: int):
    """A gated mixture whose experts are all alike."""
    options = MoeOptions(activation="silu", k=k, normalize=True)
    return layers.Moe(Router(weight[:experts], None, 1e-5), [MlpWeights(up, up, down)] * experts, options)


def bank(layer) -> tuple[Tensor, Tensor, Tensor]:
    return layer.bank.u, layer.bank.v, layer.bank.gamma


def router_weight(layer) -> Tensor:
    return layer.router.weight


def route_logits(layer, x: Tensor) -> tuple[Tensor, Tensor]:
    router = layer.router
    rstd = None if router.norm_eps is None else add_norm.rstd_of(x, router.norm_eps)
    return ffn_in.router_logits(x, router.weight, router.bias, layer.options.tau, rstd)


def compose(layer, x: Tensor, atoms: Tensor, weights: Tensor, static: Tensor) -> Tensor:
    u, v, gamma = bank(layer)
    return layers.expand(layers.contract(x, u, atoms, weights), v, atoms, gamma, static, x, x.dtype)


def select_and_compose(layer, logits: Tensor, maxima: Tensor, x: Tensor, static: Tensor) -> Tensor:
    return select_compose.select_compose(logits, maxima, x, layer.bank, static, layer.options)


def compose_rows(
    logits: Tensor, maxima: Tensor, x: Tensor, u: Tensor, v: Tensor, gamma: Tensor, static: Tensor, k: int
) -> Tensor:
    options = FfnOptions(activation="gelu", k=k, eps=1e-6)
    return select_compose.select_compose(logits, maxima, x, AtomBank(u, v, gamma), static, options)


def served(layer, x: Tensor, picks: Tensor, signal: Tensor) -> Tensor:
    """A DSC layer as the engine calls it, which watches what is picked."""
    return layer(x, x, False, picks, signal)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, longest: int, scale: float
) -> Tensor:
    return attention.decode_attention(query, KvCache(keys, values), tables, lengths, longest, scale)


def run_experts(layer, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return sum_experts(x, weights, experts, layer.up, layer.gate, layer.down, layer.activation)


def sum_experts(
    x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation
) -> Tensor:
    slots = moe.expert_slots(x, weights, experts.int(), up, gate, down, activation)
    k, d = slots.shape[1:]
    return add_norm.summed(x, add_norm.Parts(slots, k, d, k * d), x.dtype)


# The runner's inputs and steps.


def capacity(model: Decoder, blocks: int, context: int) -> EngineCapacity:
    picked, picking = picking_layers(model.config)
    return EngineCapacity(
        vocab_size=model.config.vocab_size,
        max_model_len=context,
        num_blocks=blocks,
        block_size=BLOCK,
        picks=picked.of,
        picking=picking,
        picks_per_token=picked.per_token,
    )


def make_runner(model: Decoder, running: int, context: int) -> Runner:
    blocks = running * -(-context // BLOCK) + 8
    return Runner(model, capacity(model, blocks, context), max(STEP_TOKENS, running), running, capture())


def make_engine(runner: Runner, running: int, context: int) -> Engine:
    blocks = running * -(-context // BLOCK)
    steps = max(STEP_TOKENS, running)
    config = EngineConfig(
        device=DEVICE.type, max_running=running, step_tokens=steps, itl_target_ms=60_000.0, prefix_cache=False
    )
    return Engine(config, capacity(runner.model, blocks, context), runner, (), routing=runner.routing)


def is_prefilling(engine: Engine) -> bool:
    scheduler = engine.scheduler
    return bool(scheduler.waiting) or any(request.num_uncomputed > 1 for request in scheduler.running.values())


def running_ids(engine: Engine) -> list[str]:
    return list(engine.scheduler.running)


def graph_sizes(runner: Runner) -> list[int] | None:
    """Sequences of greedy steps that are replayed as they are."""
    if runner.graphs is None:
        return None
    keys = [key for key in runner.graphs.graphs.keys if not key.tokens]
    return sorted({key.decodes for key in keys if key_of(runner, key.decodes) == key})


def fill_caches(runner: Runner, generator: torch.Generator) -> None:
    for pair in runner.kv_caches:
        for pool in pair:
            pool.normal_(generator=generator)


def fill(runner: Runner, contexts: list[int], seed: int = 0) -> None:
    """Let the first rows of the runner's inputs be single tokens of sequences with these contexts."""
    generator = torch.Generator(CPU).manual_seed(seed)
    inputs = runner._inputs
    inputs.wait()
    inputs._held[:] = [None] * len(inputs._held)
    inputs._changed.update(range(len(contexts)))
    order = torch.randperm(sum(-(-context // BLOCK) for context in contexts), generator=generator)
    at = 0
    for row, context in enumerate(contexts):
        need = -(-context // BLOCK)
        table = order[at : at + need]
        at += need
        inputs.tables[0, row, :need] = table
        inputs.contexts[row] = context
        ids, positions, offsets, blocks = inputs.tokens[:, row : row + 1]
        ids[0] = int(torch.randint(runner.model.config.vocab_size, (1,), generator=generator))
        positions[0], blocks[0], offsets[0] = context - 1, table[(context - 1) // BLOCK], (context - 1) % BLOCK


def pad(runner: Runner, rows: int, padded: int) -> None:
    runner._inputs.wait()
    runner._inputs.pad(rows, padded, runner._spare_block)


def eager(runner: Runner, size: int) -> Tensor:
    """The hidden states of what lies in the inputs, without a graph."""
    held = runner._inputs.on_device(size, size)
    return runner.model.hidden(StepBatch(*held, size, runner._max_context_len, ()), runner.kv_caches)


def key_of(runner: Runner, size: int) -> GraphKey:
    """The graph of a greedy step, or what serves it."""
    return runner.graphs.key(GREEDY, size)


def has_head(runner: Runner, size: int) -> bool:
    return FORMS[key_of(runner, size).form].has_head


def bucket(runner: Runner, size: int) -> int:
    return key_of(runner, size).decodes


def drawn(runner: Runner, size: int) -> Tensor:
    """What the last replay of a greedy step has drawn."""
    return runner.graphs._room.tokens[:size]


def copy_inputs(runner: Runner, size: int) -> None:
    runner._inputs.on_device(size, size)


def replay(runner: Runner, size: int) -> Tensor:
    return runner.graphs.graphs.replay(key_of(runner, size))
