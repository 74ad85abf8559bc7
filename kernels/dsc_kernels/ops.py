"""What models call: layers and operators, each built for the fastest implementation there is for its device and dtype.

Selection is exact for the logits, which are float32 sums: by clamped logit descending, then index ascending. Native
and Triton layers in bfloat16 round the folded router weight to bfloat16 once, at load; plain ones keep it in float32,
so they may pick other atoms where logits nearly tie.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from dsc_kernels import dequantised, native, plain
from dsc_kernels.backend import Backend, Basis, BoundAdapter, Ffn, Head, Layer, Linear, Moe, Stack
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import (
    MAX_PICKS,
    NOT_TUNED,
    WHOLE,
    AtomBank,
    ChunkPlace,
    DecoderLayer,
    FfnOptions,
    KvCache,
    MlpWeights,
    Module,
    MoeOptions,
    NormWeights,
    Pair,
    Place,
    QkNorm,
    Router,
    Scope,
    SharedExpert,
    Slots,
    Tuning,
    Update,
)

__all__ = ["Ffn", "Head", "Layer", "Linear", "Stack"]

CPU = torch.device("cpu")

_choice = "auto"


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


def use_dependent_launch(choice: str) -> None:
    """Whether kernels for a GPU begin while the one before them ends, from now on: "auto", where it can, or "off"."""
    if triton_installed():
        from dsc_kernels.gpu import compiler

        compiler.use_dependent_launch(choice)


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


def backend(dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend in use for tensors of this kind: `native`, `gpu.layers` or `plain`."""
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


def linear(weight: Weight, bias: Tensor | None = None) -> Linear:
    """A product with weight [n, d], packed where that is faster."""
    return backend(weight.dtype, weight.device).Linear(weight, bias)


def head(weight: Weight) -> Head:
    """An output head [words, d]."""
    return backend(weight.dtype, weight.device).Head(weight)


def ffn(mlp: MlpWeights, options: FfnOptions, router: Router | None = None, bank: AtomBank | None = None) -> Ffn:
    """A dense, DSC or mixture-of-LoRAs layer. The router may come in any wider dtype."""
    chosen = backend(mlp.up.dtype, mlp.up.device) if options.k * max(options.rank, 1) <= MAX_PICKS else plain
    if chosen is not plain and router is not None:
        router = replace(router, weight=router.weight.to(mlp.up.dtype))
    return chosen.Ffn(mlp, options, router, bank)


def widens_bfloat16(device: torch.device) -> bool:
    """Whether kernels in use read bfloat16 as fast as their instruction set allows, be it without its products."""
    return native.active() in native.WIDENING_SETS and device.type == "cpu" and _choice != "triton"


def moe(router: Router, experts: Sequence[MlpWeights], options: MoeOptions, shared: SharedExpert | None = None) -> Moe:
    """A mixture of experts. The router may come in any wider dtype."""
    dtype = experts[0].up.dtype
    chosen = backend(dtype, experts[0].up.device)
    if chosen is native and options.k > MAX_PICKS:
        chosen = plain
    if chosen is not plain:
        router = replace(router, weight=router.weight.to(dtype))
    return chosen.Moe(router, experts, options, shared)


def compose(static: Tensor, x: Tensor, picked: Tensor, weights: Tensor, bank: AtomBank, rank: int = 0) -> Tensor:
    """static [B, d] plus what rows that were picked elsewhere make of x [B, d]; see `backend.Backend.compose_rows`."""
    return backend(x.dtype, x.device).compose_rows(static, x, picked, weights, bank, rank)


def sampled(weights: Tensor, parameters: Tensor, tokens: Tensor) -> Tensor:
    """A token of each row of weights, where Triton serves: see `gpu.sample.sample`."""
    from dsc_kernels.gpu.sample import sample

    return sample(weights, parameters, tokens)


def basis(
    pairs: Mapping[Place, Pair],
    modules: Sequence[Mapping[str, Module]],
    dtype: torch.dtype,
    device: torch.device,
) -> Basis:
    """What adapters share of a decoder of this dtype and device, whose layers have these modules."""
    return backend(dtype, device).basis(pairs, modules, dtype, device)


def adapter(
    updates: Mapping[Place, Update],
    modules: Sequence[Mapping[str, Module]],
    dtype: torch.dtype,
    device: torch.device,
    basis: Basis | None = None,
    tunings: Mapping[int, Tuning] = NOT_TUNED,
) -> BoundAdapter:
    """An adapter's updates, and tunings by layer, for a decoder of this dtype and device with these modules."""
    return backend(dtype, device).adapter(updates, modules, dtype, device, basis, tunings)


def summed(parts: Sequence[tuple[BoundAdapter, float]], dtype: torch.dtype, device: torch.device) -> BoundAdapter:
    """Such adapters with weights as one."""
    return backend(dtype, device).summed(parts)


def stack(
    token_embedding: Weight,
    position_embedding: Tensor | None,
    layers: Sequence[DecoderLayer],
    embedding_scale: float = 1.0,
) -> Stack | None:
    """Embeddings and all layers in one call, where the backend in use offers it and computes all of them; else None."""
    chosen = backend(token_embedding.dtype, token_embedding.device)
    return chosen.stack(token_embedding, position_embedding, layers, embedding_scale)


def embed(weight: Weight, ids: Tensor) -> Tensor:
    """Rows of an embedding [words, d] in its dtype: ids [T] → [T, d]."""
    return dequantised.embed(weight, ids)


def norm(x: Tensor, weights: NormWeights, residual: Tensor | None = None) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, of rows x [T, d], in float32, plus residual [T, d] where one is given."""
    return backend(x.dtype, x.device).norm(x, weights, residual)


def store_kv(
    qkv: Tensor,
    heads: int,
    cos_sin_cache: Tensor | None,
    slots: Slots,
    cache: KvCache,
    qk_norm: QkNorm | None = None,
) -> None:
    """Write new tokens' keys and values to the cache, queries and keys turned first; see `backend.Backend`."""
    backend(qkv.dtype, qkv.device).store_kv(qkv, heads, cos_sin_cache, slots, cache, qk_norm)


def decode_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """Attention of one new token per sequence over its cached keys and values; see `backend.Backend`."""
    return backend(q.dtype, q.device).decode_attention(q, cache, tables, contexts, max_context_len, scale, scope)


def chunks_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    chunks: Iterable[ChunkPlace],
    out: Tensor,
    scale: float,
    scope: Scope = WHOLE,
) -> None:
    """Attention of the new tokens of some sequences, each up to itself, to their rows; see `backend.Backend`."""
    backend(q.dtype, q.device).chunks_attention(q, cache, tables, chunks, out, scale, scope)
