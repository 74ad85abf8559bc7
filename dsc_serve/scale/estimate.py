"""What serving DSC models on 1 to 1,000 GPUs needs and costs, by arithmetic from stated inputs. Nothing is measured.

A step's time is the sum over its phases of the longer of reading their bytes and computing their products, plus what
has to travel between the GPUs that share a replica, plus a fixed time per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Sharding = Literal["rows", "columns", "mixed"]
CANDIDATE_BYTES = 8  # a float32 logit and a 32-bit atom id
FLOAT32 = 4
SHARDS = (1, 2, 4, 8)  # GPUs of one replica: those of one host, between which links are fast
USABLE = 0.9  # of a GPU's memory
MOST = 1024  # sequences in a step
SCREENED_TOKENS = 32  # in a step, up to which the certified int8 router is read instead of the exact one


@dataclass(frozen=True)
class ModelSizes:
    """A decoder of DSC layers in the paper's notation."""

    d: int
    layers: int
    vocabulary: int
    kv: int  # width of the keys, and of the values
    atoms: int
    k: int
    static: int
    context: int  # tokens that a sequence attends over
    tied: bool = False  # one V × d, not two
    weight_bytes: float = 2
    router_bytes: float = 2  # for one weight of the router: 1 with the certified int8 router

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return 2 * self.d * self.d + 2 * self.d * self.kv

    @property
    def layer(self) -> dict[str, int]:
        """Weights of one layer by what they are for."""
        d = self.d
        return {
            "attention": self.attention,
            "router": self.atoms * d,
            "static": 2 * d * self.static,
            "bank": 2 * self.atoms * d,
        }

    @property
    def parameters(self) -> int:
        """All of them; norms, biases, gamma and positions, below a thousandth, are left out."""
        return self.layers * sum(self.layer.values()) + (1 if self.tied else 2) * self.vocabulary * self.d

    @property
    def resident_bytes(self) -> float:
        """Weights as they lie in memory; the certified router keeps its exact rows beside the int8 ones."""
        int8 = self.layers * self.atoms * self.d * self.router_bytes if self.router_bytes < self.weight_bytes else 0
        return self.parameters * self.weight_bytes + int8

    @property
    def kv_bytes(self) -> float:
        """Of one token, in all layers."""
        return 2 * self.kv * self.layers * self.weight_bytes

    def distinct(self, tokens: int) -> float:
        """Atoms of one layer that a step of so many tokens reads, picked uniformly: the worst case."""
        return self.atoms * (1 - (1 - self.k / self.atoms) ** tokens)


@dataclass(frozen=True)
class Machine:
    """One GPU and its links. Bytes per second, floating-point operations per second, seconds, dollars."""

    memory: float = 80e9
    bandwidth: float = 3.35e12
    flops: float = 989e12
    reached: float = 0.6  # the share of either peak that kernels get
    link: float = 450e9  # to its peers, in one direction
    link_latency_s: float = 8e-6
    layer_s: float = 10e-6
    price_per_hour: float = 2.5


def all_reduce_bytes(values: float, shards: int, value_bytes: float) -> float:
    """What each of `shards` GPUs sends in a ring all-reduce of so many values."""
    return 2 * (shards - 1) / shards * values * value_bytes


def all_gather_bytes(values: float, shards: int, value_bytes: float) -> float:
    """What each GPU sends so that all have the `values` that each of them holds."""
    return (shards - 1) * values * value_bytes


def exchanges(model: ModelSizes, tokens: int, shards: int, sharding: Sharding) -> dict[str, float]:
    """Bytes that each GPU sends for one layer and step, by exchange. x and the layer's output are whole on every GPU.

    rows: a GPU holds atoms with their router rows, finds its own K best of each token, and adds up its own picks; their
    sum travels with that of the static part. columns: a GPU holds a slice of d of the bank and of the router, so that
    logits and latents are sums over GPUs. mixed: the router by rows, the bank by columns.
    """
    if shards == 1:
        return {}
    output = all_reduce_bytes(tokens * model.d, shards, model.weight_bytes)
    found = {"attention": output, "output": output}
    if sharding == "columns":
        found["logits"] = all_reduce_bytes(tokens * model.atoms, shards, FLOAT32)
    else:
        found["candidates"] = all_gather_bytes(tokens * model.k, shards, CANDIDATE_BYTES)
    if sharding != "rows":
        found["latents"] = all_reduce_bytes(tokens * model.k, shards, FLOAT32)
    return found


def phases(
    model: ModelSizes, machine: Machine, tokens: int, shards: int, sharding: Sharding = "rows"
) -> dict[str, float]:
    """Seconds of one decode step of `tokens` sequences, by phase."""

    def busy(read: float, products: float) -> float:
        rate = machine.reached * shards
        return max(read / (machine.bandwidth * rate), 2 * products / (machine.flops * rate))

    d, w = model.d, model.weight_bytes
    weights = model.layer
    router_bytes = model.router_bytes if tokens <= SCREENED_TOKENS else w
    layer = {
        "attention": busy(weights["attention"] * w, tokens * weights["attention"]),
        "KV cache": busy(tokens * model.context * 2 * model.kv * w, 2 * tokens * model.context * d),
        "router": busy(weights["router"] * router_bytes, tokens * weights["router"]),
        "static": busy(weights["static"] * w, tokens * weights["static"]),
        "atoms": busy(model.distinct(tokens) * 2 * d * w, 2 * tokens * model.k * d),
        "exchange": sum(
            machine.link_latency_s + sent / machine.link for sent in exchanges(model, tokens, shards, sharding).values()
        ),
        "fixed": machine.layer_s,
    }
    head = busy(model.vocabulary * d * w, tokens * model.vocabulary * d)
    return {**{name: model.layers * seconds for name, seconds in layer.items()}, "head": head}


@dataclass(frozen=True)
class PlacementPlan:
    """How GPUs serve a model."""

    shards: int  # GPUs of a replica
    replicas: int
    tokens: int  # sequences of a replica at a time
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.replicas * self.tokens / self.step_s


def plan(model: ModelSizes, machine: Machine, gpus: int, target_s: float) -> PlacementPlan | None:
    """The fewest GPUs per replica that hold the model with its KV cache, and the batch that serves most tokens.

    target_s: the longest step, so the longest time between a sequence's tokens. None: the model does not fit.
    """
    for shards in SHARDS:
        room = USABLE * machine.memory * shards - model.resident_bytes
        most = min(MOST, int(room / (model.kv_bytes * model.context)))
        batches = [tokens for tokens in (most, *(2**i for i in range(10))) if 0 < tokens <= most]
        steps = {tokens: sum(phases(model, machine, tokens, shards).values()) for tokens in batches}
        fast = [tokens for tokens, seconds in steps.items() if seconds <= target_s]
        if shards <= gpus and fast:
            best = max(fast, key=lambda tokens: tokens / steps[tokens])
            return PlacementPlan(shards, gpus // shards, best, steps[best])
    return None


def dollars_per_million(tokens_per_s: float, gpus: int, machine: Machine, utilisation: float) -> float:
    return gpus * machine.price_per_hour / 3600 / (tokens_per_s * utilisation) * 1e6


def prompt_tokens_per_s(model: ModelSizes, machine: Machine, shards: int, hit_rate: float) -> float:
    """Prompt tokens that one replica takes in, bound by products; those found in the prefix cache cost nothing.

    Products of attention over the prompt itself are left out.
    """
    weights = model.layer
    products = model.layers * (weights["attention"] + weights["router"] + weights["static"] + 2 * model.k * model.d)
    return machine.flops * machine.reached * shards / (2 * products) / (1 - hit_rate)


MODELS: Mapping[str, ModelSizes] = {
    "paper": ModelSizes(384, 6, 50_304, 384, 1523, 4, 327, 256, tied=True),
    "large": ModelSizes(1024, 24, 50_304, 1024, 3055, 4, 451, 256, tied=True),
    "10B": ModelSizes(4096, 32, 128_256, 1024, 16_384, 64, 7168, 4096),
    "160B": ModelSizes(8192, 80, 128_256, 1024, 65_536, 128, 14_336, 4096),
}


def certified(model: ModelSizes) -> ModelSizes:
    """With the router's certified int8 rows, which halve what a step of few tokens reads of it.

    Rows that are scored again, and the launch that does it, are left out: `dsc-serve kernels steps` has both.
    """
    return replace(model, router_bytes=1)
