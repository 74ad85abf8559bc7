"""Linear and FFN layers with packed weights, and norms."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.backend import UNROUTED
from dsc_kernels.native.adapters import layer_runs, mlp_shapes
from dsc_kernels.native.dispatch import screens, threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.packing import bank_rows, packed, rows_of
from dsc_kernels.native.screen import NO_SCREEN, ScreenedRows, padded_bias, screen
from dsc_kernels.native.tensors import address, check, check_all, is_bf16
from dsc_kernels.quantised import QuantisedWeight, Weight
from dsc_kernels.weights import (
    ATOMS,
    MAX_PICKS,
    Activation,
    Adapted,
    AtomBank,
    FfnOptions,
    MlpWeights,
    NormWeights,
    Router,
)

NAME = "native"
ACTIVATIONS: dict[str, int] = {"none": 0, "gelu": 1, "silu": 2, "gelu_tanh": 3}


class Linear:
    """out = act(x Wᵀ + bias) + residual with a packed weight W [n, d]; sums in float32."""

    backend = NAME

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self._weight = packed(weight)
        self.packed, self.format = self._weight.panels, self._weight.format
        self.n, self.d = weight.shape
        self.dtype = weight.dtype
        check_all({"bias": (bias, (self.n,))})
        self.bias = None if bias is None else bias.float().contiguous()
        self._is_bf16 = is_bf16(self.dtype)

    def __call__(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [B, d] → [B, n] in x's dtype, or in float32 when out_dtype says so (then without residual)."""
        batch = x.shape[0]
        check("x", x, (batch, self.d), self.dtype)
        if out_dtype not in (None, self.dtype, torch.float32):
            raise ValueError(f"out_dtype is {out_dtype}; allowed: {self.dtype} and torch.float32")
        out = torch.empty(batch, self.n, dtype=out_dtype or self.dtype)
        if residual is not None:
            check("residual", residual, (batch, self.n), out.dtype)
            residual = residual.contiguous()
        x = x.contiguous()
        wide = int(out.dtype == torch.float32)
        if batch:
            kernels.linear(
                is_bf16=self._is_bf16,
                x=x.data_ptr(),
                w=self.packed.data_ptr(),
                w_format=address(self.format),
                bias=address(self.bias),
                residual=address(residual),
                out=out.data_ptr(),
                batch=batch,
                d=self.d,
                n=self.n,
                activation=ACTIVATIONS[activation],
                float_out=wide,
                threads=threads(),
            )
        return out


class PackedLayer:
    """What FFN layers share: a capsule of addresses, and the tensors that must outlive it."""

    backend = NAME
    owns_weights = True

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        self.d, self.dtype = d, dtype
        self.module_shapes: dict[str, tuple[int, int]] = {}  # (out, into) of what adapters may add to
        self._kept: list[object] = []
        self.capsule: object = None
        self.k = 0  # rows that a token picks; 0: none are

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _keep_packed(self, name: str, *weights: Weight | None) -> dict[str, int]:
        """Weights of one shape, packed: the arguments `name` and `name`_format; 0 for None."""
        given = [weight for weight in weights if weight is not None]
        if not given:
            return {name: 0, f"{name}_format": 0}
        try:
            whole = packed(*given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self._kept.append(whole)
        return dict(zip((name, f"{name}_format"), whole.addresses, strict=True))

    def _keep_rows(self, name: str, rows: ScreenedRows) -> dict[str, int]:
        """The arguments `name` and `name`_format."""
        self._kept.append(rows)
        return {name: address(rows.values), f"{name}_format": address(rows.format)}

    def _keep_wide(self, tensor: Tensor | None) -> int:
        """The same as float32."""
        return self._keep(None if tensor is None else tensor.float())

    def _ready(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        check("x", x, (x.shape[0], self.d), self.dtype)
        if residual is not None:
            check("residual", residual, (x.shape[0], self.d), self.dtype)
            residual = residual.contiguous()
        return x.contiguous(), residual, torch.empty(x.shape[0], self.d, dtype=self.dtype)

    def check_outputs(self, batch: int, picks: Tensor | None, weights: Tensor | None, signal: Tensor | None) -> None:
        """Raise ValueError unless there is room for what so many tokens pick: [≥ batch, k], of the signal [≥ batch]."""
        for name, tensor, dtype in (("picks", picks, torch.int32), ("weights", weights, torch.float32)):
            if tensor is not None:
                check(name, tensor, (max(batch, tensor.shape[0]), self.k), dtype, in_place=True)
        if signal is not None:
            check("signal", signal, (max(batch, signal.shape[0]),), torch.float32, in_place=True)


class Ffn(PackedLayer):
    """A static MLP plus a routed composition of rank-1 atoms; see `backend.Ffn`.

    The router's weight has the MLP's dtype here. Raises ValueError for what does not fit.
    """

    def __init__(
        self, mlp: MlpWeights, options: FfnOptions, router: Router | None = None, bank: AtomBank | None = None
    ) -> None:
        if (router is None) != (bank is None):
            raise ValueError(UNROUTED)
        hidden, d = mlp.up.shape
        super().__init__(d, mlp.up.dtype)
        self.module_shapes = mlp_shapes(mlp)
        if router is not None and not options.rank:
            self.module_shapes[ATOMS] = router.weight.shape[0], d
        k, rank = options.k, options.rank
        self.k, self.atoms = k, 0 if router is None else router.weight.shape[0]
        if not min(1, self.atoms) <= k <= self.atoms or rank < 0 or k * max(rank, 1) > MAX_PICKS:
            raise ValueError(f"k is {k}, rank {rank}; k · rank may be at most {MAX_PICKS}, k from 1 to {self.atoms}")
        check_all({"gate": (mlp.gate, (hidden, d)), "down": (mlp.down, (d, hidden))}, self.dtype)
        self._check_biases(mlp, hidden)
        self.screen, bias, gamma, weight, norm_eps = NO_SCREEN, None, None, None, -1.0
        u = v = ScreenedRows()
        if router is not None and bank is not None:
            self._check_routing(router, bank, rank)
            weight, gamma = router.weight, bank.gamma.float()
            u, v = bank_rows("u", bank.u), bank_rows("v", bank.v)
            bias = padded_bias(router.bias, self.atoms)
            norm_eps = norm_eps if router.norm_eps is None else router.norm_eps
            if isinstance(weight, QuantisedWeight) and weight.compensation is not None:
                raise ValueError(f"router has a compensation of rank {weight.rank}; its rows have none")
            if rank == 0 and screens(weight, k):
                self.screen, weight = screen(weight, router.bias, rows_of("router", weight)), None
        s = self.screen
        self.capsule = kernels.ffn_layer(
            is_bf16=is_bf16(self.dtype),
            **self._keep_packed("up", mlp.up),
            **self._keep_packed("gate", mlp.gate),
            **self._keep_packed("down", mlp.down),
            **self._keep_packed("router", weight),
            **self._keep_rows("u", u),
            **self._keep_rows("v", v),
            **self._keep_rows("screen_rows", ScreenedRows(s.rows, s.rows_format, s.scales)),
            up_bias=self._keep_wide(mlp.up_bias),
            gate_bias=self._keep_wide(mlp.gate_bias),
            down_bias=self._keep_wide(mlp.down_bias),
            router_bias=self._keep(bias),
            gamma=self._keep(gamma),
            d=d,
            hidden=hidden,
            atoms=self.atoms,
            tau=options.tau,
            eps=options.eps,
            norm_eps=norm_eps,
            k=k,
            rank=rank,
            scalar_gamma=int(gamma is not None and gamma.numel() == 1),
            silent=int(options.silent),
            activation=ACTIVATIONS[options.activation],
            screen_packed=self._keep(s.packed),
            screen_steps=self._keep(s.steps),
            screen_shifts=self._keep(s.shifts),
            screen_errors=self._keep(s.errors),
            screen_norms=self._keep(s.norms),
            screen_slack=s.slack,
            screen_counters=self._keep(s.counters),
        )

    def _check_biases(self, mlp: MlpWeights, hidden: int) -> None:
        if mlp.gate is None and mlp.gate_bias is not None:
            raise ValueError("a bias of a gate, but no gate")
        biases = {"up_bias": (mlp.up_bias, (hidden,)), "gate_bias": (mlp.gate_bias, (hidden,))}
        check_all({**biases, "down_bias": (mlp.down_bias, (self.d,))})

    def _check_routing(self, router: Router, bank: AtomBank, rank: int) -> None:
        rows = (self.atoms * max(rank, 1), self.d)
        check_all(
            {"router": (router.weight, (self.atoms, self.d)), "u": (bank.u, rows), "v": (bank.v, rows)}, self.dtype
        )
        gamma = (1 if bank.gamma.numel() == 1 else self.d,)
        check_all({"router_bias": (router.bias, (self.atoms,)), "gamma": (bank.gamma, gamma)})

    @property
    def screened(self) -> bool:
        """Whether the router is screened in int8."""
        return self.screen.counters is not None

    @property
    def rescored(self) -> tuple[int, int]:
        """Router rows that screening could not rule out so far, and the tokens that this was for; 0 where none is."""
        return self.screen.count("rescored"), self.screen.count("tokens")

    def screens(self, tokens: int) -> bool:
        """Whether its router is screened in a step of so many tokens."""
        return self.screened

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        grouped: bool = False,
        picks: Tensor | None = None,
        signal: Tensor | None = None,
        *,
        adapted: Adapted | None = None,
    ) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d].

        grouped: compose the tokens in an order in which neighbours share atoms; the output is the same, bit for bit.
        picks int32 [≥ B, k], signal float32 [≥ B]: where given, the atoms picked and the signal are written there.
        """
        x, residual, out = self._ready(x, residual)
        self._run(x, residual, out, grouped, picks, None, signal, adapted)
        return out

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms int32 [B, k], coefficients [B, k] and signal [B] in float32."""
        if not self.atoms:
            raise ValueError("this layer has no router")
        x, residual, out = self._ready(x, residual)
        picks = torch.empty(x.shape[0], self.k, dtype=torch.int32)
        weights, signal = torch.empty(x.shape[0], self.k), torch.empty(x.shape[0])
        self._run(x, residual, out, False, picks, weights, signal, adapted)
        return out, picks, weights, signal

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        out: Tensor,
        grouped: bool,
        picks: Tensor | None,
        weights: Tensor | None,
        signal: Tensor | None,
        adapted: Adapted | None,
    ) -> None:
        batch = x.shape[0]
        self.check_outputs(batch, picks, weights, signal)
        runs = layer_runs(adapted, batch, self.module_shapes, self.dtype)
        if batch:
            kernels.ffn(
                self.capsule,
                x=x.data_ptr(),
                residual=address(residual),
                out=out.data_ptr(),
                batch=batch,
                threads=threads(),
                picks=address(picks),
                weights=address(weights),
                signal=address(signal),
                grouped=int(grouped),
                runs=runs.runs,
                run_count=runs.run_count,
                run_of=runs.run_of,
                layer_index=runs.layer_index,
            )


def norm(x: Tensor, weights: NormWeights, residual: Tensor | None = None) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, of rows x [T, d] in float32 and rounded once; weights have x's dtype.

    residual [T, d]: is added before that, where it is given.
    """
    batch, d = x.shape
    weight, bias = weights.weight, weights.bias
    check("x", x, (batch, d), x.dtype)
    check("weight", weight, (d,), x.dtype)
    if bias is not None:
        check("bias", bias, (d,), x.dtype)
        bias = bias.contiguous()
    if residual is not None:
        check("residual", residual, (batch, d), x.dtype)
        residual = residual.contiguous()
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(batch, d, dtype=x.dtype)
    if batch:
        kernels.norm(
            is_bf16=is_bf16(x.dtype),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=address(bias),
            residual=address(residual),
            out=out.data_ptr(),
            batch=batch,
            d=d,
            eps=weights.eps,
            threads=threads(),
        )
    return out
