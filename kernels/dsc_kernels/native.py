"""The C++ kernels for CPUs: packed weights, and whole layers in one call.

Missing where no compiler was found at installation; then `available()` is empty and plain torch serves (`ops`).
Tensors are float32 or bfloat16 on the CPU. A layer keeps the tensors whose addresses it holds.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from dsc_kernels.memory import resident
from dsc_kernels.screen import MAX_WIDTH, NO_SCREEN, padded_bias, screen

try:
    from dsc_kernels import _native
except ImportError:
    _native = None  # type: ignore[assignment]

Activation = Literal["none", "gelu", "silu"]

LANES = 16
MAX_PICKS = 64
ACTIVATIONS: dict[str, int] = {"none": 0, "gelu": 1, "silu": 2}
HALF = {torch.float32: 0, torch.bfloat16: 1}

RouterPrecision = Literal["auto", "exact", "int8-certified"]
ROUTER_PRECISIONS: tuple[RouterPrecision, ...] = get_args(RouterPrecision)
SCREENED_ATOMS = 128  # for each that is picked, from which on it is faster
SCREENING_SETS = ("avx512bf16",)  # whose int8 products are faster than the others

_active: str | None = None
_router: RouterPrecision = "auto"


def available() -> list[str]:
    """Instruction sets that this machine has kernels for, best first."""
    return [] if _native is None else list(_native.supported())


def active() -> str | None:
    """The instruction set in use; None when plain torch serves."""
    return _active


def use(name: str) -> None:
    """Serve with an instruction set of `available()`, with the best of them ("auto"), or not at all ("plain").

    A setting of the whole process: layers that exist compute with the new instruction set from now on, and "plain"
    keeps new layers, and what has no layer (attention, sampling), from using native kernels.
    Raises ValueError for a name that is not available, naming those that are.
    """
    global _active
    names = available()
    if name == "auto":
        name = names[0] if names else "plain"
    if name == "plain":
        _active = None
        return
    if name not in names:
        raise ValueError(f"kernels {name!r} are not available here; allowed: auto, plain, {', '.join(names)}")
    module().use(name)
    _active = name


def use_router(precision: RouterPrecision) -> None:
    """Score with the router as it is ("exact"), or screen it in int8 first ("int8-certified"); both pick the same.

    "auto" screens where that is faster. A setting of the whole process, for DSC layers made from now on.
    """
    global _router
    if precision not in ROUTER_PRECISIONS:
        raise ValueError(f"router_precision {precision!r} is not known; allowed: {', '.join(ROUTER_PRECISIONS)}")
    _router = precision


def router_precision() -> RouterPrecision:
    """The setting in use, for `use_router` to take again."""
    return _router


def screens(router: Tensor, k: int) -> bool:
    """Whether a DSC layer with this router [atoms, d] screens it in int8."""
    if _router == "auto":
        return _active in SCREENING_SETS and router.shape[0] >= SCREENED_ATOMS * k and router.shape[1] <= MAX_WIDTH
    return _router == "int8-certified"


def module() -> ModuleType:
    if _native is None:
        raise RuntimeError("dsc_kernels was installed without a compiler: there are no native kernels")
    return _native


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native kernels are in use for tensors of this kind."""
    return _active is not None and device.type == "cpu" and dtype in HALF


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def pack(*weights: Tensor) -> Tensor:
    """Weights [N, D] of one shape and dtype, packed one after the other into panels of 16 outputs."""
    n, d = weights[0].shape
    width = d if weights[0].dtype == torch.float32 else -(-d // 2) * 2
    size = -(-n // LANES) * LANES * width
    packed = torch.empty(len(weights), size, dtype=weights[0].dtype)
    for weight, out in zip(weights, packed, strict=True):
        if weight.shape != (n, d) or weight.dtype != packed.dtype:
            raise ValueError(f"weights packed together must be alike; got {tuple(weight.shape)} and {(n, d)}")
        rows = weight.contiguous()  # under a name: a copy must live until it is packed
        module().pack(HALF[rows.dtype], rows.data_ptr(), n, d, out.data_ptr())
    return packed


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {got}; expected {dtype} {list(shape)} on the CPU")


class Linear:
    """out = act(x Wᵀ + bias) + residual with a packed weight W [n, d]; sums in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.n, self.d = weight.shape
        self.dtype = weight.dtype
        self.packed = resident(pack(weight))
        self.bias = None if bias is None else bias.float().contiguous()
        self._half, self._w, self._b = HALF[self.dtype], self.packed.data_ptr(), address(self.bias)

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
        out = torch.empty(batch, self.n, dtype=out_dtype or self.dtype)
        if residual is not None:
            check("residual", residual, (batch, self.n), out.dtype)
            residual = residual.contiguous()
        x = x.contiguous()
        wide = int(out.dtype == torch.float32)
        if batch:
            module().linear(
                *(self._half, x.data_ptr(), self._w, self._b, address(residual), out.data_ptr(), batch, self.d, self.n),
                *(ACTIVATIONS[activation], wide, threads()),
            )
        return out


class _Layer:
    """What FFN layers share: a capsule of addresses, and the tensors that must outlive it."""

    owns_weights = True

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        self.d, self.dtype = d, dtype
        self._kept: list[Tensor] = []
        self.capsule: object = None

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _ready(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        check("x", x, (x.shape[0], self.d), self.dtype)
        if residual is not None:
            check("residual", residual, (x.shape[0], self.d), self.dtype)
            residual = residual.contiguous()
        return x.contiguous(), residual, torch.empty(x.shape[0], self.d, dtype=self.dtype)


class Ffn(_Layer):
    """A static MLP plus a routed composition of rank-1 atoms: DSC; with `rank`, a mixture of LoRAs; without, dense.

    up, gate [hidden, d], down [d, hidden]; router [atoms, d] folded with its norm, router_bias [atoms];
    u, v [atoms · max(rank, 1), d]; gamma float32 [d] or [1]. norm_eps: of the folded norm, None without one.
    """

    def __init__(
        self,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        activation: Activation,
        router: Tensor | None = None,
        router_bias: Tensor | None = None,
        u: Tensor | None = None,
        v: Tensor | None = None,
        gamma: Tensor | None = None,
        k: int = 0,
        rank: int = 0,
        tau: float = 0.0,
        eps: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        hidden, d = up.shape
        super().__init__(d, up.dtype)
        self.k, self.atoms = k, 0 if router is None else router.shape[0]
        if k * max(rank, 1) > MAX_PICKS or k > self.atoms:
            raise ValueError(f"k is {k}, rank {rank}; k · rank may be at most {MAX_PICKS}, k at most {self.atoms}")
        if router is not None:
            if u is None or v is None or gamma is None:
                raise ValueError("a routed layer needs u, v and gamma")
            for name, bank in (("u", u), ("v", v)):
                check(name, bank, (self.atoms * max(rank, 1), d), self.dtype)
        bias = None if router is None else padded_bias(router_bias, self.atoms)
        screened = router is not None and rank == 0 and screens(router, k)
        self.screen = screen(router, router_bias, rows=True) if router is not None and screened else NO_SCREEN
        pieces = [None if w is None else resident(pack(w)) for w in (up, gate, down, None if screened else router)]
        scale = None if gamma is None else gamma.float()
        self.capsule = module().ffn_layer(
            HALF[self.dtype],
            *(self._keep(p) for p in pieces),
            *(self._keep(t) for t in (bias, u, v, scale)),
            *(d, hidden, self.atoms, tau, eps, -1.0 if norm_eps is None else norm_eps, k, rank),
            *(int(scale is not None and scale.numel() == 1), ACTIVATIONS[activation]),
            *(self._keep(t) for t in self.screen.tensors),
            *(self.screen.slack, self._keep(self.screen.counts)),
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        grouped: bool = False,
        picks: Tensor | None = None,
        signal: Tensor | None = None,
    ) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d].

        grouped: compose the tokens in an order in which neighbours share atoms; the output is the same, bit for bit.
        picks int32 [≥ B, k], signal float32 [≥ B]: where given, the atoms picked and the signal are written there.
        """
        x, residual, out = self._ready(x, residual)
        self._run(x, residual, out, grouped, picks, None, signal)
        return out

    def routed(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms int32 [B, k], coefficients [B, k] and signal [B] in float32."""
        x, residual, out = self._ready(x, residual)
        picks = torch.empty(x.shape[0], self.k, dtype=torch.int32)
        weights, signal = torch.empty(x.shape[0], self.k), torch.empty(x.shape[0])
        self._run(x, residual, out, False, picks, weights, signal)
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
    ) -> None:
        batch = x.shape[0]
        if picks is not None:
            check("picks", picks, (max(batch, picks.shape[0]), self.k), torch.int32)
        if signal is not None:
            check("signal", signal, (max(batch, signal.shape[0]),), torch.float32)
        if batch:
            module().ffn(
                *(self.capsule, x.data_ptr(), address(residual), out.data_ptr(), batch, threads()),
                *(address(picks), address(weights), address(signal), int(grouped)),
            )


class Moe(_Layer):
    """The mixture of experts in one call: routing, grouping by expert, both products and the weighted sum.

    router [experts, d] folded with its norm; up, gate, down: one matrix per expert.
    """

    def __init__(
        self,
        router: Tensor,
        router_bias: Tensor | None,
        up: list[Tensor],
        gate: list[Tensor] | None,
        down: list[Tensor],
        activation: Activation,
        k: int,
        normalize: bool,
        norm_eps: float | None,
    ) -> None:
        hidden, d = up[0].shape
        super().__init__(d, up[0].dtype)
        experts = router.shape[0]
        if not 1 <= k <= min(experts, MAX_PICKS):
            raise ValueError(f"k is {k}; it must be between 1 and {min(experts, MAX_PICKS)}")
        bias = None if router_bias is None else router_bias.float()
        self.capsule = module().moe_layer(
            HALF[self.dtype],
            *(self._keep(resident(pack(router))), self._keep(bias)),
            *(0 if ws is None else self._keep(resident(pack(*ws))) for ws in (up, gate, down)),
            *(d, hidden, experts, -1.0 if norm_eps is None else norm_eps, k, int(normalize), ACTIVATIONS[activation]),
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        x, residual, out = self._ready(x, residual)
        if x.shape[0]:
            module().moe(self.capsule, x.data_ptr(), address(residual), out.data_ptr(), x.shape[0], threads())
        return out


def store_kv(
    qkv: Tensor,
    heads: int,
    angles: Tensor | None,
    positions: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Write new tokens' keys and values to the pools; queries (in place) and keys are turned by `angles` first.

    qkv [T, heads + 2 · kv heads, size], contiguous; angles float32 [positions, 2, size / 2] (cosines, sines) or None;
    positions, blocks, offsets: int64 [T]; keys, values: [blocks, kv heads, block, size].
    """
    tokens, _, size = qkv.shape
    _, kv_heads, block, _ = keys.shape
    check("qkv", qkv, (tokens, heads + 2 * kv_heads, size), keys.dtype)
    if not qkv.is_contiguous():
        raise ValueError("qkv must be contiguous: it is changed in place")
    if tokens:
        module().store_kv(
            *(HALF[qkv.dtype], qkv.data_ptr(), address(angles), positions.data_ptr(), blocks.data_ptr()),
            *(offsets.data_ptr(), keys.data_ptr(), values.data_ptr(), tokens, heads, kv_heads, size, block, threads()),
        )


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values, without copying them.

    q [S, heads, size] (rows may be strided); keys, values [blocks, kv heads, block, size]; tables int64 [S, W];
    contexts int64 [S], at most `longest`. Returns [S, heads, size].
    """
    batch, heads, size = q.shape
    blocks, kv_heads, block, _ = keys.shape
    check("keys", keys, (blocks, kv_heads, block, size), q.dtype)
    check("values", values, (blocks, kv_heads, block, size), q.dtype)
    check("tables", tables, (batch, tables.shape[1]), torch.int64)
    check("contexts", contexts, (batch,), torch.int64)
    if longest > tables.shape[1] * block or heads % kv_heads or tables.stride(1) != 1:
        raise ValueError(f"tables {list(tables.shape)} of {block}-token blocks do not hold contexts of {longest}")
    if q.stride(2) != 1 or q.stride(1) != size:
        q = q.contiguous()
    out = torch.empty(batch, heads, size, dtype=q.dtype)
    if batch:
        module().attention(
            *(HALF[q.dtype], q.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), contexts.data_ptr()),
            *(out.data_ptr(), batch, q.stride(0), tables.stride(0), kv_heads, heads // kv_heads, size, block, longest),
            *(scale, threads()),
        )
    return out


def chunk_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: int, scale: float) -> Tensor:
    """Attention of the last tokens of one sequence, each up to itself, over paged keys and values as they lie.

    q [n, heads, size] (rows may be strided): positions context − n … context − 1; keys, values [blocks, kv heads,
    block, size]; table int64 [W]. Returns [n, heads, size].
    """
    count, heads, size = q.shape
    blocks, kv_heads, block, _ = keys.shape
    check("keys", keys, (blocks, kv_heads, block, size), q.dtype)
    check("values", values, (blocks, kv_heads, block, size), q.dtype)
    check("table", table, (table.shape[0],), torch.int64)
    if not count <= context <= table.shape[0] * block or heads % kv_heads or table.stride(0) != 1:
        raise ValueError(f"{table.shape[0]} blocks of {block} tokens do not hold {context}, of which {count} are new")
    if q.stride(2) != 1 or q.stride(1) != size:
        q = q.contiguous()
    out = torch.empty(count, heads, size, dtype=q.dtype)
    if count:
        module().chunk_attention(
            *(HALF[q.dtype], q.data_ptr(), keys.data_ptr(), values.data_ptr(), table.data_ptr(), out.data_ptr()),
            *(count, q.stride(0), context, kv_heads, heads // kv_heads, size, block, scale, threads()),
        )
    return out


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, of rows x [T, d] with weight [d] of x's dtype, in float32 and rounded once."""
    batch, d = x.shape
    check("weight", weight, (d,), x.dtype)
    if bias is not None:
        check("bias", bias, (d,), x.dtype)
        bias = bias.contiguous()
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(batch, d, dtype=x.dtype)
    if batch:
        addresses = x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr()
        module().norm(HALF[x.dtype], *addresses, batch, d, eps, threads())
    return out


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """A token id int64 [R] for each row of float32 logits [R, V], without sorting a row.

    temperature float32 [R], 0 for the most likely token; top_k int64 [R] and top_p float64 [R], V and 1 for no limit;
    min_p float32 [R]; u float64 [R] in [0, 1). Rows without a finite largest logit are drawn fairly among its equals.
    """
    rows, vocabulary = logits.shape
    columns = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "u": u}
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float32, torch.float64)
    check("logits", logits, (rows, vocabulary), torch.float32)
    for (name, column), dtype in zip(columns.items(), dtypes, strict=True):
        check(name, column, (rows,), dtype)
    out = torch.empty(rows, dtype=torch.int64)
    logits = logits.contiguous()
    ordered = [column.contiguous() for column in columns.values()]
    if rows:
        addresses = [t.data_ptr() for t in (logits, *ordered, out)]
        module().sample(*addresses, rows, vocabulary, threads())
    return out


def min_hash_order(picks: Tensor) -> Tensor:
    """The order int32 [B] of tokens with atoms `picks` [B, K]; see `grouping.min_hash_order`."""
    picks = picks.to(torch.int32).contiguous()
    order = torch.empty(picks.shape[0], dtype=torch.int32)
    module().min_hash_order(picks.data_ptr(), *picks.shape, order.data_ptr())
    return order


def tile_unions(picks: Tensor, order: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """The different atoms int32 [n] of each tile and their offsets int64 [tiles + 1]; see `grouping.tiles`."""
    picks = picks.to(torch.int32).contiguous()
    order = None if order is None else order.to(torch.int32).contiguous()
    batch, k = picks.shape
    atoms = torch.empty(batch * k, dtype=torch.int32)
    offsets = torch.empty(-(-batch // tile) + 1, dtype=torch.int64)
    module().tile_unions(
        *(picks.data_ptr(), address(order), batch, k, min(tile, max(batch, 1)), atoms.data_ptr(), offsets.data_ptr())
    )
    return atoms[: int(offsets[-1])], offsets


use("auto")
