"""The least time a layer can take here: bytes and FLOPs by phase, over rates measured in the same run.

Bytes count each weight row that is touched once, in the dtype of the run; norms, biases, γ and activations, together
under 1 % of a layer at small batches, are left out. With B tokens, width d, e bytes an element, m matrices in an MLP
(2, or 3 with a gate) and n different atoms, adapters or experts picked by the batch:

| layer            | phase   | bytes       | FLOPs       |
|------------------|---------|-------------|-------------|
| DSC              | router  | M·d·e       | 2·B·M·d     |
|                  | static  | m·H·d·e     | 2·m·B·H·d   |
|                  | bank    | 2·n·d·e     | 4·B·K·d     |
| DSC, int8 router | router  | M·d         | 2·B·M·d / e |
| (on a GPU)       | router  | M·d         | 2·B·M·d     |
|                  | again   | n·d·e       | 2·B·K·d     |
| mixture of LoRAs | router  | N·d·e       | 2·B·N·d     |
|                  | static  | m·H·d·e     | 2·m·B·H·d   |
|                  | bank    | 2·n·r·d·e   | 4·B·k·r·d   |
| MoE              | router  | N·d·e       | 2·B·N·d     |
|                  | experts | m·n·h·d·e   | 2·m·B·k·h·d |
| dense            | static  | m·W·d·e     | 2·m·B·W·d   |

Phases follow each other, so their times add up: roofline time = Σ over phases of (bytes / bandwidth + FLOPs / rate).
Within a phase reading and computing may overlap; the overlapped time, Σ over phases of max(bytes / bandwidth,
FLOPs / rate), is the bound that nothing can beat. share = roofline time / measured time; with the first form a kernel
that overlaps well may exceed 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.bench.layer.timing import Timer, timer_for
from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig, MoloraConfig

GEMM_SHAPES = {
    "cpu": [(256, 384, 2048), (1024, 1024, 1024), (2048, 384, 2048)],
    "cuda": [(4096, 4096, 4096), (8192, 1024, 4096)],
}


@dataclass(frozen=True)
class RooflinePhase:
    """A part of a layer that must end before the next begins: bytes it reads at least, and its FLOPs.

    Products of int8 count as FLOPs of the run's dtype in the proportion of their sizes.
    """

    name: str
    bytes: float
    flops: float


CPU = torch.device("cpu")


def screened(layer: Sequence[RooflinePhase], element: int, device: torch.device = CPU) -> list[RooflinePhase]:
    """The phases of a DSC layer whose router is screened in int8: the rows that are picked are scored again.

    On a CPU its products are of int8; on a GPU they are of the dtype, in which levels are exact.
    """
    router, static, bank = layer
    again = RooflinePhase("again", bank.bytes / 2, bank.flops / 2)
    flops = router.flops / (element if device.type == "cpu" else 1)
    return [RooflinePhase("router", router.bytes / element, flops), static, again, bank]


def phases(config: ModelConfig, batch: int, distinct: float, element: int) -> list[RooflinePhase]:
    """A layer's phases at B = batch tokens that pick `distinct` different atoms, adapters or experts."""
    c, d, matrices = config.ffn, config.hidden_size, 3 if config.mlp_gated else 2

    def product(name: str, rows: int) -> RooflinePhase:
        return RooflinePhase(name, rows * d * element, 2 * batch * rows * d)

    if isinstance(c, DscConfig):
        bank = RooflinePhase("bank", 2 * distinct * d * element, 4 * batch * c.atoms_per_token * d)
        return [product("router", c.num_atoms), product("static", matrices * c.static_size), bank]
    if isinstance(c, MoloraConfig):
        picked = batch * c.adapters_per_token * c.rank
        bank = RooflinePhase("bank", 2 * distinct * c.rank * d * element, 4 * picked * d)
        return [product("router", c.num_adapters), product("static", matrices * c.static_size), bank]
    if isinstance(c, MoeConfig):
        size = matrices * c.expert_size * d
        experts = RooflinePhase("experts", distinct * size * element, 2 * batch * c.experts_per_token * size)
        router = product("router", c.num_experts)
        if c.shared_expert is None:
            return [router, experts]
        return [router, product("static", matrices * c.shared_expert.size), experts]
    return [product("static", matrices * c.size)]


@dataclass
class Rates:
    """Best rates seen."""

    gemm: float = 0.0  # FLOP/s
    bandwidth: dict[int, float] = field(default_factory=dict)  # bytes/s by the size of the buffer read, in bytes

    def measure(
        self, sizes: Iterable[int], width: int, dtype: torch.dtype, device: torch.device, seconds: float
    ) -> None:
        """Measure again, for about `seconds` per rate, and keep what is better."""
        for size in sorted(set(sizes)):
            self.bandwidth[size] = max(
                self.bandwidth.get(size, 0.0), read_bandwidth(size, width, dtype, device, seconds)
            )
        self.gemm = max(self.gemm, gemm_rate(dtype, device, seconds))

    def seconds(self, layer: Sequence[RooflinePhase], size: int) -> tuple[float, float]:
        """The roofline time of a layer whose rotated weights are `size` bytes: phases added up, and overlapped.

        Its bandwidth is the best seen over a buffer about as large or larger.
        """
        bandwidth = max(rate for read, rate in self.bandwidth.items() if read >= 0.9 * size)
        times = [(phase.bytes / bandwidth, phase.flops / self.gemm) for phase in layer]
        return sum(map(sum, times)), sum(map(max, times))


def best_seconds(run: Callable[[], object], seconds: float, timer: Timer) -> float:
    """The shortest of at least 3 runs, after one that does not count, within about `seconds`."""

    def together() -> None:
        for _ in range(timer.together):
            run()

    timed = timer.prepared(together)
    timed()
    best, runs, stop = float("inf"), 0, time.perf_counter() + seconds
    while runs < 3 or time.perf_counter() < stop:
        best = min(best, timed())
        runs += 1
    return best / timer.together


def numbers(rows: int, width: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers [rows, width] as weights have them on a device, whose clock falls with what bits change; else all one."""
    if device.type == "cpu":
        return torch.full((rows, width), scale, dtype=dtype)
    return torch.randn(rows, width, dtype=dtype, device=device) * scale


def read_bandwidth(size: int, width: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Bytes/s of reading a buffer of `size` bytes over and over: the best of a sum and of products with one vector."""
    rows = max(1, size // (width * dtype.itemsize))
    weight = numbers(rows, width, 1e-3, dtype, device)
    x = torch.ones(1, width, dtype=dtype, device=device)
    linear = ops.linear(weight)
    flat = torch.zeros(rows * width * dtype.itemsize // 4) if device.type == "cpu" else weight.view(-1)
    timer = timer_for(device)
    runs: list[Callable[[], object]] = [flat.sum, lambda: torch.mv(weight, x[0]), lambda: linear(x)]
    return weight.nbytes / min(best_seconds(run, seconds / len(runs), timer) for run in runs)


def gemm_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of x Wᵀ in the dtype: the best of torch's product and ours over a few sizes."""
    best = 0.0
    shapes = GEMM_SHAPES[device.type]
    for batch, inner, outer in shapes:
        x, weight = (numbers(rows, inner, 1e-2, dtype, device) for rows in (batch, outer))
        linear = ops.linear(weight)
        for run in (lambda x=x, w=weight: F.linear(x, w), lambda x=x, f=linear: f(x)):
            taken = best_seconds(run, seconds / len(shapes) / 2, timer_for(device))
            best = max(best, 2 * batch * inner * outer / taken)
    return best


def stored_bytes(weights: Sequence[dict[str, Tensor]]) -> int:
    """Bytes of the matrices of all rotated layers, as stored in the dtype of the run."""
    return sum(tensor.nbytes for layer in weights for tensor in layer.values())
