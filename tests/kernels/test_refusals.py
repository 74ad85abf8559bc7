"""What does not fit is refused by name before a kernel reads or writes beyond a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.layer_parts import ffn_parts, moe_parts
from support.native_cases import moe_layer, random, routed_layer
from torch import Tensor

from dsc_kernels import grouping, native
from dsc_kernels.sketch import Signature, Sketch
from dsc_kernels.weights import KvCache, MlpWeights, NormWeights, Slots

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

F32, BF16 = torch.float32, torch.bfloat16


def dsc(**changes: Any) -> dict[str, Any]:
    return ffn_parts(**{**routed_layer(torch.Generator().manual_seed(0), F32, 8, 20, 3, 6), **changes})


def experts(**changes: Any) -> dict[str, Any]:
    return moe_parts(**{**moe_layer(torch.Generator().manual_seed(0), F32, 8, 6, 3, 2), **changes})


def dense(up: Tensor, down: Tensor) -> native.Ffn:
    return native.Ffn(**ffn_parts(up, None, down, "gelu"))


def refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_that_do_not_fit() -> None:
    refused("bias is", lambda: native.Linear(torch.zeros(4, 3), torch.zeros(3)))
    refused("sizes must be at least 1", lambda: native.Linear(torch.zeros(4, 0)))
    refused("sizes must be at least 1", lambda: dense(torch.zeros(0, 8), torch.zeros(8, 0)))
    refused("not in torch.float16", lambda: native.Linear(torch.zeros(4, 3, dtype=torch.float16)))
    for name, shape in {
        "gate": (6, 7),
        "down": (8, 5),
        "router": (20, 9),
        "router_bias": (19,),
        "u": (19, 8),
        "v": (20, 7),
        "gamma": (7,),
    }.items():
        refused(f"{name} is", lambda name=name, shape=shape: native.Ffn(**dsc(**{name: torch.zeros(shape)})))
    refused("router is torch.bfloat16", lambda: native.Ffn(**dsc(router=torch.zeros(20, 8, dtype=BF16))))
    refused("k is 0", lambda: native.Ffn(**dsc(k=0)))
    refused("has no router", lambda: dense(torch.zeros(6, 8), torch.zeros(8, 6)).routed(torch.zeros(1, 8)))
    for missing in ("router", "bank"):
        refused("needs a router and a bank", lambda missing=missing: native.Ffn(**{**dsc(), missing: None}))
    some = [MlpWeights(torch.zeros(6, 8), gate, torch.zeros(8, 6)) for gate in (None, torch.zeros(6, 8), None)]
    refused("1 of 3 experts have a gate", lambda: native.Moe(**{**experts(), "experts": some}))
    refused("up of expert 2", lambda: native.Moe(**experts(up=[*2 * [torch.zeros(6, 8)], torch.zeros(5, 8)])))
    refused("router_bias is", lambda: native.Moe(**experts(router_bias=torch.zeros(2))))


def test_outputs_that_do_not_fit() -> None:
    x = torch.zeros(4, 8)
    refused("out_dtype is torch.bfloat16", lambda: native.Linear(torch.zeros(3, 8))(x, out_dtype=BF16))
    layer = native.Ffn(**dsc())
    picks, signal = torch.zeros(4, 3, dtype=torch.int32), torch.zeros(8)
    refused("picks is", lambda: layer(x, picks=picks[:3]))
    refused("picks must be contiguous", lambda: layer(x, picks=picks.repeat(1, 2)[:, ::2]))
    refused("signal must be contiguous", lambda: layer(x, picks=picks, signal=signal[::2]))
    refused("weight is", lambda: native.norm(x, NormWeights(torch.ones(7), None, 1e-5)))


def test_a_layer_is_no_layer_of_another_kind() -> None:
    ffn, moe, kernels = native.Ffn(**dsc()), native.Moe(**experts()), native.kernels
    for function, capsule in (("ffn", moe.capsule), ("moe", ffn.capsule), ("run_stack", ffn.capsule)):
        arguments = dict.fromkeys(kernels.signatures()[function], 0)
        refused("incorrect name", lambda f=function, c=capsule, a=arguments: getattr(kernels, f)(c, **a))


class Caches:
    """Two sequences of at most 12 tokens in blocks of 4, two heads of 8 for keys."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.keys, self.values = (random(g, F32, 6, 2, 4, 8) for _ in range(2))
        self.q = random(g, F32, 2, 4, 8)
        self.tables, self.contexts = torch.arange(6).view(2, 3), torch.tensor([5, 12])

    def decode(self, **changes: Any) -> Tensor:
        a = {"q": self.q, "tables": self.tables, "contexts": self.contexts, "max_context_len": 12, "scale": 0.3}
        return native.decode_attention(**a | self.with_cache(changes))

    def chunk(self, **changes: Any) -> Tensor:
        a = {"q": self.q, "table": self.tables[0], "context": 12, "scale": 0.3}
        return native.chunk_attention(**a | self.with_cache(changes))

    def store(self, **changes: Any) -> None:
        column = torch.tensor([0, 3])
        slots = Slots(*(changes.pop(name, column) for name in Slots._fields))
        a = {"qkv": torch.zeros(2, 8, 8), "heads": 4, "cos_sin_cache": torch.zeros(4, 2, 4), "slots": slots}
        native.store_kv(**a | self.with_cache(changes))

    def with_cache(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The same with keys and values, changed or not, as a cache."""
        cache = KvCache(changes.pop("keys", self.keys), changes.pop("values", self.values))
        return {**changes, "cache": cache}


def test_caches_and_tables_that_do_not_fit() -> None:
    p = Caches()
    strided = p.keys.repeat(1, 1, 1, 2)[..., ::2]
    beyond = p.tables.index_fill(1, torch.tensor([2]), 6)
    for call in (p.decode, p.chunk):
        refused("keys must be contiguous", lambda call=call: call(keys=strided))
        refused("values is", lambda call=call: call(values=p.values[:, :, :3]))
        refused("4 heads are not a multiple of 3", lambda call=call: call(keys=torch.zeros(6, 3, 4, 8)))
    refused("block table: number 2 is 6; expected at least 0 and less than 6", lambda: p.decode(tables=beyond))
    assert torch.equal(p.decode(tables=beyond, contexts=torch.tensor([5, 8])), p.decode(contexts=torch.tensor([5, 8])))
    refused("block table", lambda: p.decode(tables=p.tables - 1))
    refused("contexts: number 1 is 12", lambda: p.decode(max_context_len=11))
    refused("contexts: number 0 is -1", lambda: p.decode(contexts=torch.tensor([-1, 3])))
    refused("contexts is torch.int32", lambda: p.decode(contexts=p.contexts.int()))
    refused("block table", lambda: p.chunk(table=beyond[0]))
    refused("do not hold", lambda: p.chunk(context=13))
    wide = torch.tensor([[5, 99], [12, 99]])[:, 0]
    assert not wide.is_contiguous() and torch.equal(p.decode(contexts=wide), p.decode())


def test_slots_that_do_not_fit() -> None:
    p = Caches()
    p.store()
    refused("positions: number 1 is 3", lambda: p.store(cos_sin_cache=torch.zeros(3, 2, 4)))
    refused("cos_sin_cache is torch.float64", lambda: p.store(cos_sin_cache=torch.zeros(4, 2, 4, dtype=torch.float64)))
    refused("blocks: number 0 is 6", lambda: p.store(blocks=torch.tensor([6, 0])))
    refused("offsets: number 1 is 4", lambda: p.store(offsets=torch.tensor([0, 4])))
    refused("offsets is torch.int32", lambda: p.store(offsets=torch.tensor([0, 1]).int()))
    refused("blocks must be contiguous", lambda: p.store(blocks=torch.tensor([0, 0, 1])[::2]))
    refused("values must be contiguous", lambda: p.store(values=p.values.repeat(1, 1, 1, 2)[..., ::2]))
    odd = {"qkv": torch.zeros(2, 8, 7), "keys": torch.zeros(6, 2, 4, 7), "values": torch.zeros(6, 2, 4, 7)}
    refused("no halves", lambda: p.store(**odd, cos_sin_cache=torch.zeros(4, 2, 3)))


def test_orders_and_owners_that_do_not_fit() -> None:
    picks = torch.zeros(3, 2, dtype=torch.int32)
    refused("order: number 2 is 3", lambda: grouping.tiles(picks, torch.tensor([0, 1, 3])))
    sketch, ids, owners = Sketch(2, 9, 2, 50), np.arange(3), np.zeros(3, dtype=np.int64)
    step, signatures = np.zeros((2, 3, 2), dtype=np.int32), [Signature.empty()]
    sketch.observe(step, ids, owners, signatures)
    refused("owners: number 1 is 1", lambda: sketch.observe(step, ids, np.array([0, 1, 0]), signatures))
    refused("token ids: number 0 is -1", lambda: sketch.observe(step, ids - 1, owners, signatures))
    refused("picks are int64", lambda: sketch.observe(step.astype(np.int64), ids, owners, signatures))
    refused("picks are", lambda: sketch.observe(step.repeat(2, axis=2)[:, :, ::2], ids, owners, signatures))
    refused("owners are", lambda: sketch.observe(step, ids, np.zeros(6, dtype=np.int64)[::2], signatures))
