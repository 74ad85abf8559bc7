"""The systems of the layer benchmark: every FFN kind at iso-active sizes, through every path that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsc_kernels import native, ops
from dsc_serve.bench.layer.frozen import ScriptDsc, ScriptMoe, SortedMoe
from dsc_serve.model.budget import ParameterBudget
from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.model.ffn import KINDS
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.initial import PRESETS, preset_config
from dsc_serve.model.mixtures import MIXTURES
from dsc_serve.model.placement import Placement

Layer = Callable[[Tensor], Tensor]
Weights = dict[str, Tensor]

TINY = ParameterBudget(39072, 31072, 64, 16, 2, 32)  # for tests: d 32, DSC with 66 atoms
CONFIGS = (*PRESETS, *MIXTURES, "tiny")

# How far a path's router logits may be from exact ones; within it, another selection is as right.
EXACT_ROUTER = 1e-4
BFLOAT16_ROUTER = 2e-2

FROZEN: dict[tuple[str, str], Callable[[ModelConfig, Mapping[str, Tensor]], Layer]] = {
    ("dsc", "script"): ScriptDsc,
    ("moe", "script"): ScriptMoe,
    ("moe", "sorted"): SortedMoe,
}
SCREENED = "native int8"
PATHS = [
    *[("dsc", "native"), ("dsc", SCREENED), ("dsc", "plain"), ("dsc", "script")],
    *[("moe", "native"), ("moe", "plain"), ("moe", "sorted"), ("moe", "script")],
    *[("molora", "native"), ("molora", "plain"), ("dense", "native"), ("dense", "plain")],
]
PLAIN_MOE = ("moe", "sorted")


@dataclass
class LayerSystem:
    """One FFN kind through one path; `layers` hold different weights and are run in turn."""

    kind: str
    path: str
    layers: Sequence[Layer]
    logit_error: float = EXACT_ROUTER
    position: int = field(default=0, init=False)

    @property
    def name(self) -> tuple[str, str]:
        return self.kind, self.path

    def run(self, x: Tensor, calls: int) -> None:
        """The next `calls` layers of the rotation, each on x."""
        count = len(self.layers)
        for i in range(self.position, self.position + calls):
            self.layers[i % count](x)
        self.position = (self.position + calls) % count


def layer_config(name: str, kind: str) -> ModelConfig:
    """The model whose FFN layer is measured: a preset of `dsc-serve init`, or the tests' "tiny".

    The DSC beside a mixture is that of equal total parameters.
    """
    if name in MIXTURES:
        return preset_config(name, kind, equal="total" if kind == "dsc" else None)
    if name in PRESETS:
        return preset_config(name, kind)
    frame = {"hidden_size": TINY.width, "num_hidden_layers": TINY.layers, "vocab_size": TINY.vocab_size}
    return preset_config("paper", kind).model_copy(update={**frame, "ffn": getattr(TINY, kind)()})


def kinds_of(name: str) -> list[str]:
    """The kinds of FFN that there are at these sizes."""
    kinds = dict.fromkeys(kind for kind, _ in PATHS)
    return [kind for kind in kinds if name not in MIXTURES or kind in ("dsc", "moe")]


def describe_sizes(config: ModelConfig) -> str:
    """The layer's sizes in one line."""
    c, d = config.ffn, config.hidden_size
    if isinstance(c, DscConfig):
        return f"d {d}, M {c.num_atoms}, K {c.atoms_per_token}, H {c.static_size}"
    if isinstance(c, MoeConfig):
        shared = "" if c.shared_expert is None else f", and a shared one of {c.shared_expert.size}"
        return f"d {d}, {c.num_experts} experts of {c.expert_size}, top {c.experts_per_token}{shared}"
    if isinstance(c, MoloraConfig):
        return f"d {d}, {c.num_adapters} adapters of rank {c.rank}, top {c.adapters_per_token}, H {c.static_size}"
    assert isinstance(c, DenseConfig)
    return f"d {d}, width {c.size}; equal in total parameters, all of them active, as in the paper"


def random_weights(config: ModelConfig, seed: int, dtype: torch.dtype) -> Weights:
    """One layer's stored tensors, such that every path computes the same layer and each part of it shows in the output.

    A router's row has opposite halves: it is centred exactly, so that folding the norm rounds nothing; logits have a
    deviation of 0.4, as the paper's initialisation gives them at its width. γ of 2 to 6
    makes the dynamic part as large as the static one, so that an error in it cannot hide.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in KINDS[config.ffn.kind].shapes(config).items():
        tensor = torch.randn(shape, generator=generator)
        if name == "router.weight":
            half = tensor[:, : shape[1] // 2] * 0.4 * shape[1] ** -0.5
            tensor = torch.cat([half, -half], dim=1)
        elif name == "gamma":
            tensor = 2 + 4 * torch.rand(shape, generator=generator)
        elif name.startswith("router_norm"):
            tensor = torch.full(shape, float(name.endswith("weight")))
        else:
            tensor *= 0.05 if name.startswith("adapters") else 0.02
        weights[name] = tensor.to(dtype)
    return weights


def random_input(batch: int, width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """x [B, d] of mean 0 and variance 1 per token, as it leaves a block's second norm."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, width, generator=generator)
    return torch.nn.functional.layer_norm(x, (width,)).to(dtype).to(device)


def build_layer(
    config: ModelConfig, path: str, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Layer | None:
    """The layer through a path, on its own copy of the weights; None where the path is not there.

    "native" is what `dsc_kernels.ops` serves with, where that is not plain torch, with an exact router; SCREENED has a
    certified int8 router; "plain" is the same with native kernels switched off; other paths are the frozen baselines,
    of which the reference script's know plain MLPs alone.
    """
    kind = config.ffn.kind
    if path == "script" and config.mlp_gated:
        return None
    own = {name: tensor.to(device, copy=True) for name, tensor in weights.items()}
    if (kind, path) in FROZEN:
        return FROZEN[kind, path](config, own)
    before, precision = ops.chosen(), native.router_precision()
    ops.use("plain" if path == "plain" else "auto")
    native.use_router("int8-certified" if path == SCREENED else "exact")
    try:
        layer = KINDS[kind](config, own, Placement(dtype, device))
    finally:
        ops.use(before)
        native.use_router(precision)
    backend = layer.layer.backend
    if path == SCREENED and not (isinstance(layer, DscFfn) and layer.layer.screened):
        return None
    return layer if (backend == "plain") == (path == "plain") else None


def build_system(
    config: ModelConfig, path: str, weights: Sequence[Weights], dtype: torch.dtype, device: torch.device
) -> LayerSystem | None:
    """A kind through a path with one layer per item of weights; None where the path is not there."""
    layers: list[Layer] = []
    for stored in weights:
        layer = build_layer(config, path, stored, dtype, device)
        if layer is None:
            return None
        layers.append(layer)
    kind = config.ffn.kind
    rounded = (kind, path) in FROZEN and dtype == torch.bfloat16
    return LayerSystem(kind, path, layers, BFLOAT16_ROUTER if rounded else EXACT_ROUTER)
