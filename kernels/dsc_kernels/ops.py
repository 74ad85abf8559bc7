"""What models call: layers and operators, each built for the fastest implementation there is for its device and dtype.

Selection is exact for the logits, which are float32 sums: by clamped logit descending, then index ascending. Native
and Triton layers in bfloat16 round the folded router weight to bfloat16 once, at load; plain ones keep it in float32,
so they may pick other atoms where logits nearly tie.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from dsc_kernels import head as native_head
from dsc_kernels import native, plain
from dsc_kernels.native import Activation
from dsc_kernels.stack import BlockLayers, NormWeights, Stack

CPU = torch.device("cpu")

_choice = "auto"


class Linear(Protocol):
    """out = act(x Wᵀ + bias) + residual; see `native.Linear`."""

    def __call__(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class Head(Linear, Protocol):
    """A linear layer that also tells where its outputs are largest; see `head.Head`."""

    def largest(self, x: Tensor) -> Tensor: ...


class Layer(Protocol):
    """x [B, d] → the layer's output plus residual, [B, d]."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class Ffn(Protocol):
    """A dense, DSC or mixture-of-LoRAs layer; see `native.Ffn`."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        grouped: bool = False,
        picks: Tensor | None = None,
        signal: Tensor | None = None,
    ) -> Tensor: ...

    def routed(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms [B, k], coefficients [B, k] and signal [B] in float32."""
        ...


def use(name: str) -> None:
    """Choose what serves in this process from now on: "auto", "plain", "triton" or one of `native.available()`.

    auto: native kernels on the CPU, Triton's on a GPU, and plain torch where they do not serve. triton: as auto, and on
    the CPU too where Triton interprets kernels. Layers that exist keep their implementation.
    Raises ValueError for a name that is not available, naming those that are.
    """
    global _choice
    if name == "triton" and not triton_installed():
        raise ValueError("kernels 'triton' are not available here: Triton is not installed (pip install triton)")
    native.use("auto" if name == "triton" else name)
    _choice = name


def chosen() -> str:
    """The name in use, for `use` to take again."""
    return _choice


@functools.cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


def compiler_errors() -> tuple[type[Exception], ...]:
    """What is raised where Triton cannot compile or start a kernel; nothing while it is not loaded."""
    if "triton" not in sys.modules:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


def triton_serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton kernels are in use for tensors of this kind. Their layers never wait for the device."""
    wanted = _choice == "triton" or (device.type == "cuda" and _choice != "plain")
    if not wanted or not triton_installed():
        return False
    from dsc_kernels.gpu import compiler

    return compiler.serves(dtype, device)


def implementation(dtype: torch.dtype, device: torch.device) -> Any:
    """The module in use for tensors of this kind: `gpu.layers`, `native` or `plain`, which offer the same names."""
    if native.serves(dtype, device) and _choice != "triton":
        return native
    if triton_serves(dtype, device):
        from dsc_kernels.gpu import layers

        return layers
    return native if native.serves(dtype, device) else plain


def description(device: torch.device = CPU) -> str:
    """Which implementations serve on a device of this machine, for logs and `inspect`."""
    if triton_serves(torch.float32, device):
        return "Triton" if device.type == "cuda" else "Triton, interpreted"
    if device.type == "cuda":
        return f"plain torch (Triton is {'there, but switched off' if triton_installed() else 'not installed: slower'})"
    name = native.active()
    if name is not None:
        return f"native C++ ({name})"
    if native.available():
        return "plain torch (native kernels are there, but switched off)"
    return "plain torch (installed without a C++ compiler: slower)"


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A product with weight [n, d], packed where that is faster; see `native.Linear`."""
    layer: Linear = implementation(weight.dtype, weight.device).Linear(weight, bias)
    return layer


def head(weight: Tensor) -> Head:
    """An output head [words, d]; see `head.Head`."""
    module = implementation(weight.dtype, weight.device)
    layer: Head = (native_head.Head if module is native else module.Linear)(weight)
    return layer


def ffn(
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
) -> Ffn:
    """A dense, DSC or mixture-of-LoRAs layer; see `native.Ffn`. The router may come in any wider dtype."""
    module = implementation(up.dtype, up.device) if k * max(rank, 1) <= native.MAX_PICKS else plain
    if module is not plain and router is not None:
        router = router.to(up.dtype)
    layer: Ffn = module.Ffn(up, gate, down, activation, router, router_bias, u, v, gamma, k, rank, tau, eps, norm_eps)
    return layer


def moe(
    router: Tensor,
    router_bias: Tensor | None,
    up: list[Tensor],
    gate: list[Tensor] | None,
    down: list[Tensor],
    activation: Activation,
    k: int,
    normalize: bool,
    norm_eps: float | None,
) -> Layer:
    """A mixture of experts; see `native.Moe`. The router may come in any wider dtype."""
    module = implementation(up[0].dtype, up[0].device)
    if module is native and k > native.MAX_PICKS:
        module = plain
    if module is not plain:
        router = router.to(up[0].dtype)
    layer: Layer = module.Moe(router, router_bias, up, gate, down, activation, k, normalize, norm_eps)
    return layer


def stack(
    words: Tensor,
    places: Tensor | None,
    norms: Sequence[tuple[NormWeights, NormWeights]],
    projections: Sequence[tuple[Linear, Linear]],
    heads: int,
    kv_heads: int,
    angles: Tensor | None,
    ffns: Sequence[object],
) -> Stack | None:
    """Embedding and all blocks in one call, where every layer is native; None elsewhere. See `stack.Stack`."""
    blocks = []
    for (norm1, norm2), (qkv, out), ffn in zip(norms, projections, ffns, strict=True):
        if not (isinstance(qkv, native.Linear) and isinstance(out, native.Linear)):
            return None
        if not isinstance(ffn, native.Ffn | native.Moe):
            return None
        blocks.append(BlockLayers(norm1, qkv, out, heads, kv_heads, angles, norm2, ffn))
    return Stack(words, places, blocks)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, of rows x [T, d] with weight [d], in float32; see `native.norm`."""
    out: Tensor = implementation(x.dtype, x.device).norm(x, weight, bias, eps)
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
    """Write new tokens' keys and values to the pools, turned by `angles` first; see `native.store_kv`."""
    implementation(qkv.dtype, qkv.device).store_kv(qkv, heads, angles, positions, blocks, offsets, keys, values)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values; see `native.decode_attention`."""
    module = implementation(q.dtype, q.device)
    out: Tensor = module.decode_attention(q, keys, values, tables, contexts, longest, scale)
    return out


def chunk_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: int, scale: float) -> Tensor:
    """Attention of the last tokens of one sequence, each up to itself; see `native.chunk_attention`."""
    out: Tensor = implementation(q.dtype, q.device).chunk_attention(q, keys, values, table, context, scale)
    return out
