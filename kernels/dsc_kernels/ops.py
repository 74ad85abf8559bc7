"""What models call: layers and operators, each built for the fastest implementation there is for its device and dtype.

Selection is exact for the logits, which are float32 sums: by clamped logit descending, then index ascending. Native
bfloat16 layers round the folded router weight to bfloat16 once, at load; plain ones keep it in float32, so the two may
pick other atoms where logits nearly tie.
"""

from __future__ import annotations

from torch import Tensor

from dsc_kernels import native, plain
from dsc_kernels.native import Activation
from dsc_kernels.plain import gather_context as gather_context

Linear = native.Linear | plain.Linear
Ffn = native.Ffn | plain.Ffn
Moe = native.Moe | plain.Moe


def description() -> str:
    """Which implementations serve on this machine's CPU, for logs and `inspect`."""
    name = native.active()
    if name is not None:
        return f"native C++ ({name})"
    if native.available():
        return "plain torch (native kernels are there, but switched off)"
    return "plain torch (installed without a C++ compiler: slower)"


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A product with weight [n, d], packed where that is faster."""
    kind = native.Linear if native.serves(weight.dtype, weight.device) else plain.Linear
    return kind(weight, bias)


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
    kind: type[native.Ffn] | type[plain.Ffn] = plain.Ffn
    if native.serves(up.dtype, up.device) and k * max(rank, 1) <= native.MAX_PICKS:
        kind = native.Ffn
        router = None if router is None else router.to(up.dtype)
    return kind(up, gate, down, activation, router, router_bias, u, v, gamma, k, rank, tau, eps, norm_eps)


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
) -> Moe:
    """A mixture of experts; see `native.Moe`. The router may come in any wider dtype."""
    kind: type[native.Moe] | type[plain.Moe] = plain.Moe
    if native.serves(up[0].dtype, up[0].device) and k <= native.MAX_PICKS:
        kind = native.Moe
        router = router.to(up[0].dtype)
    return kind(router, router_bias, up, gate, down, activation, k, normalize, norm_eps)


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
    run = native.store_kv if native.serves(qkv.dtype, qkv.device) else plain.store_kv
    run(qkv, heads, angles, positions, blocks, offsets, keys, values)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values; see `native.decode_attention`."""
    run = native.decode_attention if native.serves(q.dtype, q.device) else plain.decode_attention
    return run(q, keys, values, tables, contexts, longest, scale)
