"""What a layer must compute, in float64, and whether a system computes it: no speed is given for a wrong result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import reference
from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig, MoloraConfig

# of a token's output, by 2-norm: rounding of weights, products and sums in the dtype
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Expected:
    """One layer's output [B, d] in float64, the margin [B] between its last picked logit and the next, and how many
    different atoms, adapters or experts the batch picked."""

    output: Tensor
    margin: Tensor
    distinct: int


def expected(config: ModelConfig, weights: Mapping[str, Tensor], x: Tensor) -> Expected:
    """The layer of stored weights on x [B, d], whatever their dtype and device; computed in float64 on the CPU."""
    x, c = x.double().cpu(), config.ffn
    stored = _Stored(config, weights)
    if isinstance(c, MoeConfig):
        logits = stored.logits(x)
        values, experts = reference.softmax_top_k(logits, c.experts_per_token)
        if c.normalize_weights:
            values = values / values.sum(dim=1, keepdim=True)
        out = torch.zeros_like(x)
        for e in torch.unique(experts).tolist():
            token, slot = (experts == e).nonzero(as_tuple=True)
            out.index_add_(0, token, stored.mlp(x[token], f"experts.{e}.") * values[token, slot, None])
        if c.shared_expert is not None:
            gate = F.linear(x, stored.wide("shared_expert_gate.weight")).sigmoid() if c.shared_expert.gated else 1.0
            out = out + gate * stored.mlp(x, "shared_expert.")
        return Expected(out, _margin(logits, c.experts_per_token), len(torch.unique(experts)))
    if isinstance(c, DscConfig):
        logits = stored.logits(x)
        values, atoms = reference.select(logits, c.atoms_per_token, c.tau)
        coefficients, _ = reference.coefficients(values, c.eps)
        picked, rows = torch.unique(atoms, return_inverse=True)
        u, v = (stored.rows(name, picked) for name in ("atoms_u", "atoms_v"))
        if c.atoms == "raw":
            u, v = reference.project(u, c.eps), reference.project(v, c.eps)
        dynamic = reference.compose(x, rows, coefficients, u, v, stored.wide("gamma"))
        margin = _margin(logits.clamp(-c.tau, c.tau), c.atoms_per_token)
        return Expected(stored.mlp(x, "static.") + dynamic, margin, len(picked))
    if isinstance(c, MoloraConfig):
        logits = stored.logits(x)
        values, adapters = logits.topk(c.adapters_per_token, dim=1)
        picked, rows = torch.unique(adapters, return_inverse=True)
        a, b = (stored.rows(name, picked) for name in ("adapters_a", "adapters_b"))
        out, gates = stored.mlp(x, "static."), values.softmax(dim=1)
        for slot in range(c.adapters_per_token):
            latent = torch.einsum("bd,brd->br", x, a[rows[:, slot]]) * gates[:, slot, None]
            out = out + torch.einsum("br,brd->bd", latent, b[rows[:, slot]])
        return Expected(out, _margin(logits, c.adapters_per_token), len(picked))
    return Expected(stored.mlp(x, ""), torch.full(x.shape[:1], torch.inf, dtype=x.dtype), 0)


class _Stored:
    """A layer's stored tensors, widened as they are asked for."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def wide(self, name: str) -> Tensor:
        return self.weights[name].cpu().double()

    def rows(self, name: str, indices: Tensor) -> Tensor:
        return self.weights[name].cpu()[indices].double()

    def logits(self, x: Tensor) -> Tensor:
        if "router_norm.weight" in self.weights:
            norm = (self.wide("router_norm.weight"), self.wide("router_norm.bias"))
            x = F.layer_norm(x, x.shape[1:], *norm, self.config.norm_eps)
        return F.linear(x, self.wide("router.weight"), self.wide("router.bias") if self._biased else None)

    @property
    def _biased(self) -> bool:
        return "router.bias" in self.weights

    def mlp(self, x: Tensor, prefix: str) -> Tensor:
        act = reference.ACTIVATIONS[self.config.hidden_act]

        def product(x: Tensor, name: str) -> Tensor:
            name = f"{prefix}{name}_proj"
            bias = self.wide(f"{name}.bias") if f"{name}.bias" in self.weights else None
            return F.linear(x, self.wide(f"{name}.weight"), bias)

        up = product(x, "up")
        return product(act(product(x, "gate")) * up if self.config.mlp_gated else act(up), "down")


def _margin(logits: Tensor, k: int) -> Tensor:
    if k == logits.shape[1]:
        return torch.full(logits.shape[:1], torch.inf, dtype=logits.dtype)
    top = logits.topk(k + 1, dim=1).values
    return top[:, k - 1] - top[:, k]


@dataclass(frozen=True)
class Verdict:
    """How right a layer's result is."""

    error: float  # the largest relative error of a token's output
    compared: int  # tokens whose selection is beyond doubt
    wrong: str | None  # what is wrong; None for a right result


def verdict(outputs: Sequence[Tensor], wanted: Sequence[Expected], dtype: torch.dtype, logit_error: float) -> Verdict:
    """Compare one output [B, d] per layer with what is wanted.

    A token whose margin is within logit_error may rightly pick another atom or expert, where the layer is
    discontinuous: it is not compared, but must be finite.
    """
    worst, compared = 0.0, 0
    for output, want in zip(outputs, wanted, strict=True):
        got = output.double().cpu()
        if got.shape != want.output.shape:
            return Verdict(float("inf"), 0, f"shape {list(got.shape)}, expected {list(want.output.shape)}")
        if not bool(got.isfinite().all()):
            return Verdict(float("inf"), 0, "not finite")
        clear = want.margin > logit_error
        sizes = want.output[clear].norm(dim=1).clamp_min(1e-30)
        errors = (got - want.output)[clear].norm(dim=1) / sizes
        compared += int(clear.sum())
        worst = max([worst, *errors.tolist()])
    if not compared:
        return Verdict(worst, 0, f"no token's selection is clear by {logit_error:g}; nothing could be compared")
    tolerance = TOLERANCE[dtype]
    return Verdict(worst, compared, None if worst <= tolerance else f"relative error {worst:.2g} above {tolerance:g}")
