"""The operators as PyTorch knows them: `torch.ops.dsc.…`, on CPUs and GPUs, traceable, usable under `torch.compile`.

Importing this registers them. They take plain weights and run what `ops` builds of those; packed weights are kept until
the ones they were made of are gone or changed, so only the first call is slow. Each has a twin of its name in
`reference` (`compose` adds to what is static), and none has a derivative. The engine calls the layers themselves: an
operator that is registered in Python costs some microseconds a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dsc_kernels import native, ops, plain
from dsc_kernels.backend import OwningLayer
from dsc_kernels.weights import AtomBank, FfnOptions, KvCache, MlpWeights, MoeOptions, Router

LIBRARY: Any = torch.library.Library("dsc", "DEF")  # type: ignore[no-untyped-call]

Key = tuple[object, ...]


class BuiltLayers:
    """Layers that own copies of their weights, by the weights they were built of, until one of those is gone.

    A weight is known by its storage, place and version; inference tensors have no version, so changes to those in place
    are not seen. A weak reference keeps what a storage is known by from being another's. Layers that hold the weights
    themselves cost nothing to build, and would keep them alive.
    """

    def __init__(self) -> None:
        self._layers: dict[Key, tuple[OwningLayer, list[StorageWeakRef]]] = {}

    def get(self, settings: Key, weights: tuple[Tensor | None, ...], build: Callable[[], OwningLayer]) -> OwningLayer:
        """The layer of these weights, of which it copies one at least."""
        key = (ops.chosen(), native.active(), settings, *map(identity, weights))
        held = self._layers.get(key)
        if held is not None:
            return held[0]
        layer = build()
        if layer.owns_weights:
            self._layers = {k: v for k, v in self._layers.items() if not any(ref.expired() for ref in v[1])}  # type: ignore[no-untyped-call]
            storages = (w.untyped_storage() for w in weights if w is not None)
            self._layers[key] = layer, [StorageWeakRef(storage) for storage in storages]  # type: ignore[no-untyped-call]
        return layer

    def clear(self) -> None:
        self._layers.clear()

    def __len__(self) -> int:
        return len(self._layers)


def identity(weight: Tensor | None) -> Key | None:
    if weight is None:
        return None
    version = 0 if weight.is_inference() else weight._version  # noqa: SLF001  as torch's own caches do
    place = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    return (weight.untyped_storage()._cdata, *place, version)  # noqa: SLF001


layers = BuiltLayers()


def separate(x: Tensor) -> Any:
    """The backend whose `route` and `compose` serve; native kernels have them only within whole layers."""
    backend = ops.backend(x.dtype, x.device)
    return plain if backend is native else backend


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, tau: float, eps: float, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    atoms, weights, signal = separate(x).route(x, weight, bias, k, tau, eps, norm_eps)
    return atoms.int(), weights, signal


def compose(static: Tensor, x: Tensor, atoms: Tensor, weights: Tensor, u: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    out: Tensor = separate(x).compose(static, x, atoms, weights, u, v, gamma)
    return out


def dsc_layer(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    up, gate, down, activation, router, router_bias, u, v, gamma, k, tau, eps, norm_eps = arguments
    weights = (up, gate, down, router, router_bias, u, v, gamma)
    settings = (activation, k, tau, eps, norm_eps)

    def build() -> ops.Ffn:
        options = FfnOptions(activation=activation, k=k, tau=tau, eps=eps)
        routing = Router(router, router_bias, norm_eps), AtomBank(u, v, gamma)
        return ops.ffn(MlpWeights(up, gate, down), options, *routing)

    return layers.get(settings, weights, build)(x, residual)


def molora_layer(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    up, gate, down, activation, router, router_bias, a, b, k, norm_eps = arguments
    weights, settings = (up, gate, down, router, router_bias, a, b), (activation, k, norm_eps)

    def build() -> ops.Ffn:
        options = FfnOptions(activation=activation, k=k, rank=a.shape[1], tau=math.inf)
        adapters = AtomBank(a.flatten(0, 1), b.flatten(0, 1), torch.ones(1, device=a.device))
        return ops.ffn(MlpWeights(up, gate, down), options, Router(router, router_bias, norm_eps), adapters)

    return layers.get(settings, weights, build)(x, residual)


def moe_layer(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    router, router_bias, up, gate, down, activation, k, normalize, norm_eps = arguments
    settings = (activation, k, normalize, norm_eps)

    def build() -> OwningLayer:
        options = MoeOptions(activation=activation, k=k, normalize=normalize)
        gates = len(up) * [None] if gate is None else gate.unbind()
        experts = [MlpWeights(*one) for one in zip(up.unbind(), gates, down.unbind(), strict=True)]
        return ops.moe(Router(router, router_bias, norm_eps), experts, options)

    return layers.get(settings, (up, gate, down, router, router_bias), build)(x, residual)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, max_context_len: int, scale: float
) -> Tensor:
    return ops.decode_attention(q, KvCache(keys, values), tables, contexts, max_context_len, scale)


def like_route(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *settings: Any) -> tuple[Tensor, ...]:
    tokens = x.shape[0]
    shapes = ((tokens, k), torch.int32), ((tokens, k), torch.float32), ((tokens,), torch.float32)
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


def like_x(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def like_static(static: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return like_x(x)


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same on the device of its first tensor: Triton starts kernels on the current one."""

    def guarded(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return run(first, *rest)

    return guarded


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any] = like_x) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, on_its_device(run), "CUDA")
    torch.library.register_fake(f"dsc::{name}", fake, lib=LIBRARY)


LAYER = "Tensor x, Tensor? residual"
STATIC = "Tensor up, Tensor? gate, Tensor down, str activation"
ROUTER = "Tensor router, Tensor? router_bias"
ROUTED = "int k, float tau, float eps, float? norm_eps"
register(
    f"route(Tensor x, Tensor weight, Tensor? bias, {ROUTED}) -> (Tensor atoms, Tensor coefficients, Tensor signal)",
    route,
    like_route,
)
register(
    "compose(Tensor static, Tensor x, Tensor atoms, Tensor coefficients, Tensor u, Tensor v, Tensor gamma) -> Tensor",
    compose,
    like_static,
)
register(f"dsc_layer({LAYER}, {STATIC}, {ROUTER}, Tensor u, Tensor v, Tensor gamma, {ROUTED}) -> Tensor", dsc_layer)
register(
    f"molora_layer({LAYER}, {STATIC}, {ROUTER}, Tensor a, Tensor b, int k, float? norm_eps) -> Tensor", molora_layer
)
register(f"moe_layer({LAYER}, {ROUTER}, {STATIC}, int k, bool normalize, float? norm_eps) -> Tensor", moe_layer)
register(
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor tables, Tensor contexts, int max_context_len,"
    " float scale) -> Tensor",
    decode_attention,
)
