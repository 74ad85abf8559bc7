"""The mixture of experts in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_kernels.native.adapters import layer_runs, mlp_shapes
from dsc_kernels.native.dispatch import threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.layers import ACTIVATIONS, PackedLayer
from dsc_kernels.native.tensors import address, check_all, is_bf16
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import MAX_PICKS, Adapted, MlpWeights, MoeOptions, Router, SharedExpert, gates_of

MATRICES = ("shared_up", "shared_gate", "shared_down")
# a shared expert's arguments
SHARED = (*MATRICES, *(f"{matrix}_format" for matrix in MATRICES), "shared_scale", "shared_hidden")


class Moe(PackedLayer):
    """The mixture of experts in one call: routing, grouping by expert, both products and the weighted sum.

    An expert that all tokens share is computed in the same call. Raises ValueError for what does not fit.
    """

    def __init__(
        self, router: Router, experts: Sequence[MlpWeights], options: MoeOptions, shared: SharedExpert | None = None
    ) -> None:
        gates = gates_of(experts)
        hidden, d = experts[0].up.shape
        super().__init__(d, experts[0].up.dtype)
        count, k = len(experts), options.k
        self.k = k
        if not 1 <= k <= min(count, MAX_PICKS):
            raise ValueError(f"k is {k}; it must be between 1 and {min(count, MAX_PICKS)}")
        shapes: dict[str, tuple[Weight | None, tuple[int, ...]]] = {"router": (router.weight, (count, d))}
        for e, expert in enumerate(experts):
            shapes[f"up of expert {e}"] = expert.up, (hidden, d)
            shapes[f"gate of expert {e}"] = expert.gate, (hidden, d)
            shapes[f"down of expert {e}"] = expert.down, (d, hidden)
        check_all(shapes, self.dtype)
        check_all({"router_bias": (router.bias, (count,)), "choice_bias": (router.choice_bias, (count,))})
        options.check(count)
        own = self._shared(shared, gates is not None)
        self.capsule = kernels.moe_layer(
            is_bf16=is_bf16(self.dtype),
            **self._keep_packed("router", router.weight),
            router_bias=self._keep(None if router.bias is None else router.bias.float()),
            choice_bias=self._keep(None if router.choice_bias is None else router.choice_bias.float()),
            sigmoid=int(options.scoring == "sigmoid"),
            groups=options.groups,
            groups_used=options.groups_used,
            group_picks=options.group_picks,
            weight_scale=options.weight_scale,
            **self._keep_packed("up", *(expert.up for expert in experts)),
            **self._keep_packed("gate", *(gates or [])),
            **self._keep_packed("down", *(expert.down for expert in experts)),
            d=d,
            hidden=hidden,
            experts=count,
            norm_eps=-1.0 if router.norm_eps is None else router.norm_eps,
            k=k,
            normalize=int(options.normalize),
            activation=ACTIVATIONS[options.activation],
            **own,
        )

    def _shared(self, shared: SharedExpert | None, gated: bool) -> dict[str, int]:
        """The arguments that are the shared expert's."""
        if shared is None:
            return dict.fromkeys(SHARED, 0)
        mlp, d = shared.mlp, self.d
        hidden = mlp.up.shape[0]
        if (mlp.gate is not None) != gated:
            raise ValueError("the shared expert and the others must all have a gate, or none")
        shapes: dict[str, tuple[Weight | None, tuple[int, ...]]] = {"up of the shared expert": (mlp.up, (hidden, d))}
        shapes["gate of the shared expert"] = mlp.gate, (hidden, d)
        shapes["down of the shared expert"] = mlp.down, (d, hidden)
        shapes["the shared expert's gate"] = shared.gate, (d,)
        check_all(shapes, self.dtype)
        self.module_shapes = mlp_shapes(mlp)
        return {
            **self._keep_packed("shared_up", mlp.up),
            **self._keep_packed("shared_gate", mlp.gate),
            **self._keep_packed("shared_down", mlp.down),
            "shared_scale": self._keep(shared.gate),
            "shared_hidden": hidden,
        }

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        x, residual, out = self._ready(x, residual)
        self._run(x, residual, out, None, None, adapted)
        return out

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and what was picked: experts int32 [B, k], the best choice first, and weights [B, k]."""
        x, residual, out = self._ready(x, residual)
        picks, weights = torch.empty(x.shape[0], self.k, dtype=torch.int32), torch.empty(x.shape[0], self.k)
        self._run(x, residual, out, picks, weights, adapted)
        return out, picks, weights

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        out: Tensor,
        picks: Tensor | None,
        weights: Tensor | None,
        adapted: Adapted | None,
    ) -> None:
        runs = layer_runs(adapted, x.shape[0], self.module_shapes, self.dtype)
        if x.shape[0]:
            kernels.moe(
                self.capsule,
                x=x.data_ptr(),
                residual=address(residual),
                out=out.data_ptr(),
                batch=x.shape[0],
                threads=threads(),
                picks=address(picks),
                weights=address(weights),
                runs=runs.runs,
                run_count=runs.run_count,
                run_of=runs.run_of,
                layer_index=runs.layer_index,
            )
