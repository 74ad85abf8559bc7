"""A decoder up to its last layer in one call of the native kernels: in between nothing is left to Python."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels.native.adapters import addresses, checked
from dsc_kernels.native.attention import (
    UNLIMITED,
    check_cache,
    check_cos_sin,
    check_heads,
    check_qk_norm,
    check_scope,
    qk_norm_arguments,
    turned_numbers,
)
from dsc_kernels.native.dispatch import threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.layers import Ffn, Linear
from dsc_kernels.native.moe import Moe
from dsc_kernels.native.packing import packed
from dsc_kernels.native.tensors import address, check, is_bf16
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import (
    OUTPUT_ONLY,
    SCALE_BYTES,
    AdapterRun,
    ChunkPlace,
    DecoderLayer,
    KvCache,
    LayerOutputs,
    Module,
    NormPlaces,
    NormWeights,
    Slots,
)

NORM_PLACES: dict[NormPlaces, int] = {"before": 0, "after": 1, "parallel": 2, "shared": 3, "around": 4}


def stack(
    token_embedding: Weight,
    position_embedding: Tensor | None,
    layers: Sequence[DecoderLayer],
    embedding_scale: float = 1.0,
) -> Stack | None:
    """Embeddings and all layers in one call, where every layer is native; None elsewhere. See `Stack`."""
    native = (isinstance(b.qkv, Linear) and isinstance(b.out, Linear) and isinstance(b.ffn, Ffn | Moe) for b in layers)
    return Stack(token_embedding, position_embedding, layers, embedding_scale) if all(native) else None


class Stack:
    """Native layers of one dtype. While `measure` is on, `spent` says where the time of calls goes.

    token_embedding [vocabulary, d], multiplied by `embedding_scale`; position_embedding [positions, d] where positions
    are learned.
    Raises ValueError for layers that are not native or do not fit each other.
    """

    def __init__(
        self,
        token_embedding: Weight,
        position_embedding: Tensor | None,
        layers: Sequence[DecoderLayer],
        embedding_scale: float = 1.0,
    ) -> None:
        first = layers[0]
        qkv, out, _ = native_parts(first)
        self.d, self.dtype = qkv.d, qkv.dtype
        self._ffns = [native_parts(layer)[2] for layer in layers]
        self._modules: Sequence[Mapping[str, Module]] = [modules_of(layer) for layer in layers]
        self._kept: list[object] = list(layers)
        self._kv_caches: Sequence[KvCache] = ()
        self._int8_kv = 0
        self._checked: tuple[Tensor, ...] = ()
        self._addresses = array("q")
        self._phase_ns: Tensor | None = None
        self._value_size = out.d // first.heads
        size = first.size or self._value_size
        self._cache_shape = (first.kv_heads, size)
        self._tables = 1 + max(layer.table for layer in layers)
        check_heads(first.heads, first.kv_heads)
        for table in (token_embedding, *(() if position_embedding is None else (position_embedding,))):
            check("an embedding", table, (table.shape[0], self.d), self.dtype)
        positions = [UNLIMITED if position_embedding is None else position_embedding.shape[0]]
        capsules = []
        for layer in layers:
            self._check(layer, first)
            if layer.cos_sin_cache is not None:
                positions.append(check_cos_sin(layer.cos_sin_cache, size))
            capsules.append(self._capsule(layer, size))
        self.capsule = kernels.stack(
            capsules,
            is_bf16=is_bf16(self.dtype),
            **self._token_embedding(token_embedding),
            position_embedding=self._keep(position_embedding),
            vocabulary=token_embedding.shape[0],
            positions=min(positions),
            embedding_scale=embedding_scale,
        )

    def _token_embedding(self, weight: Weight) -> dict[str, int]:
        if isinstance(weight, Tensor):
            return {"token_embedding": self._keep(weight), "token_embedding_format": 0}
        whole = packed(weight)
        self._kept.append(whole)
        return dict(zip(("token_embedding", "token_embedding_format"), whole.addresses, strict=True))

    def _capsule(self, layer: DecoderLayer, size: int) -> object:
        qkv, out, ffn = native_parts(layer)
        self._kept.append(ffn.capsule)
        check_scope(layer.scope)
        return kernels.decoder_layer(
            ffn.capsule,
            norms=NORM_PLACES[layer.norms],
            attention_norm_weight=self._keep_vector(layer.attention_norm.weight),
            attention_norm_bias=self._keep_vector(layer.attention_norm.bias),
            attention_norm_eps=layer.attention_norm.eps,
            qkv_weight=self._keep(qkv.packed),
            qkv_format=self._keep(qkv.format),
            out_format=self._keep(out.format),
            qkv_bias=self._keep(qkv.bias),
            out_weight=self._keep(out.packed),
            out_bias=self._keep(out.bias),
            **self._qk_norm(layer, size),
            turned=turned_numbers(layer.cos_sin_cache),
            cos_sin_cache=self._keep(layer.cos_sin_cache),
            d=self.d,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            size=size,
            value_size=self._value_size,
            table=layer.table,
            window=layer.scope.window,
            cap=layer.scope.cap,
            **self._norm("attended_norm", layer.attended_norm, layer.norms),
            **self._norm("fed_norm", layer.fed_norm, layer.norms),
            ffn_norm_weight=self._keep_vector(layer.ffn_norm.weight),
            ffn_norm_bias=self._keep_vector(layer.ffn_norm.bias),
            ffn_norm_eps=layer.ffn_norm.eps,
        )

    def _qk_norm(self, layer: DecoderLayer, size: int) -> dict[str, Any]:
        if layer.qk_norm is None:
            return qk_norm_arguments(None, size)
        heads, kv_heads = layer.heads, layer.kv_heads
        checked = check_qk_norm(layer.qk_norm, heads, kv_heads, size, self._value_size, self.dtype)
        self._kept.append(checked)
        return qk_norm_arguments(checked, size)

    def _norm(self, name: str, weights: NormWeights | None, places: NormPlaces) -> dict[str, Any]:
        """The arguments of a norm behind a branch, which there is where norms are around branches."""
        if (weights is None) == (places == "around"):
            raise ValueError(f"norms are {places!r}, and there is {'no' if weights is None else 'a'} {name}")
        parts = (None, None) if weights is None else (weights.weight, weights.bias)
        weight, bias = map(self._keep_vector, parts)
        return {f"{name}_weight": weight, f"{name}_bias": bias, f"{name}_eps": 0.0 if weights is None else weights.eps}

    def _check(self, layer: DecoderLayer, first: DecoderLayer) -> None:
        (qkv, out, ffn), (kv_heads, size) = native_parts(layer), self._cache_shape
        if (layer.heads, layer.kv_heads) != (first.heads, kv_heads):
            others = f"the first layer has {first.heads}, {kv_heads}"
            raise ValueError(f"{layer.heads} heads, {layer.kv_heads} for keys; {others}")
        shapes, heads, values = ((qkv.n, qkv.d), (out.n, out.d)), layer.heads, self._value_size
        rows = (heads + (1 if values < size else 2) * kv_heads) * size
        if shapes != ((rows, self.d), (self.d, heads * values)) or ffn.d != self.d or values > size:
            raise ValueError(f"projections {shapes} do not fit {heads} heads of {size} and width {self.d}")
        if (layer.size or values) != size:
            raise ValueError(f"heads of {layer.size or values}; the first layer has {size}")
        dtypes = qkv.dtype, out.dtype, ffn.dtype
        if set(dtypes) != {self.dtype}:
            raise ValueError(f"parts of a layer are {dtypes}; expected {self.dtype}")

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _keep_vector(self, vector: Tensor | None) -> int:
        if vector is not None:
            check("a norm's vector", vector, (self.d,), self.dtype)
        return self._keep(vector)

    def takes(self, kv_caches: Sequence[KvCache], runs: Sequence[AdapterRun]) -> bool:
        """All that there are."""
        return True

    def __call__(
        self,
        ids: Tensor,
        slots: Slots,
        tables: Tensor,
        contexts: Tensor,
        decodes: int,
        max_context_len: int,
        chunks: Iterable[ChunkPlace],
        kv_caches: Sequence[KvCache],
        outputs: Sequence[LayerOutputs] | None = None,
        runs: Sequence[AdapterRun] = (),
        drafted: int = 0,
    ) -> Tensor:
        """The last layer's output [T, d] for token ids int64 [T]; keys and values are written to the caches.

        tables int64 [tables, S, W], and the slots' blocks [tables, T], or of one table [S, W] and [T]; contexts
        int64 [S]. The first `decodes` tokens are one of each of as many sequences, with
        contexts of at most `max_context_len`; chunks (row of the tables, first token, tokens, context) hold the others.
        kv_caches and outputs: one per layer. runs: of tokens with adapters, in their order. Tokens of the first
        `drafted` chunks attend as single tokens do, to the same bits.
        Raises ValueError for what does not fit.
        """
        tokens, sequences = ids.shape[0], contexts.shape[0]
        if tables.dim() == 2:
            tables, slots = tables[None], Slots(slots[0], slots[1][None], slots[2])
        inputs = ids, *slots, tables, contexts
        if not same(inputs, self._checked):
            self._check_inputs(*inputs)
        num_blocks, block = self._use(kv_caches)
        if max_context_len > tables.shape[2] * block:
            shape = list(tables.shape)
            raise ValueError(f"tables {shape} of {block}-token blocks do not hold contexts of {max_context_len}")
        flat, bound = array("q", chain.from_iterable(chunks)), self._bind_outputs(outputs, tokens)
        adapted = self._bind_runs(runs)
        out = torch.empty(tokens, self.d, dtype=self.dtype)
        if tokens:
            count = threads()
            kernels.run_stack(
                self.capsule,
                out=out.data_ptr(),
                ids=ids.data_ptr(),
                positions=slots[0].data_ptr(),
                slot_blocks=slots[1].data_ptr(),
                slot_offsets=slots[2].data_ptr(),
                tables=tables.data_ptr(),
                contexts=contexts.data_ptr(),
                chunks=flat.buffer_info()[0],
                kv_caches=self._addresses.buffer_info()[0],
                outputs=bound.buffer_info()[0] if bound else 0,
                phase_ns=address(self._timers(count)),
                tokens=tokens,
                sequences=sequences,
                pages=tables.shape[2],
                width=tables.stride(1),
                table_count=tables.shape[0],
                table_stride=tables.stride(0),
                slot_stride=slots[1].stride(0),
                block=block,
                num_blocks=num_blocks,
                decodes=decodes,
                max_context_len=max_context_len,
                chunk_count=len(flat) // 4,
                drafted_count=drafted,
                runs=adapted.buffer_info()[0] if runs else 0,
                run_count=len(runs),
                int8_kv=self._int8_kv,
                threads=count,
            )
        return out

    def _check_inputs(self, *inputs: Tensor) -> None:
        """Raise ValueError for ids, positions, blocks, offsets, tables and contexts that no call could take."""
        ids, positions, blocks, offsets, tables, contexts = inputs
        tokens, sequences = ids.shape[0], contexts.shape[0]
        columns = ids, positions, offsets
        if any(c.shape != (tokens,) or c.dtype != torch.int64 or not c.is_contiguous() for c in columns):
            raise ValueError(f"ids and slots must be contiguous int64 [{tokens}]")
        check("tables", tables, (self._tables, sequences, tables.shape[-1]), torch.int64)
        check("blocks", blocks, (self._tables, tokens), torch.int64)
        check("contexts", contexts, (sequences,), torch.int64, in_place=True)
        for name, rows in (("tables", tables), ("blocks", blocks)):
            if rows.stride(-1) != 1:
                raise ValueError(f"the rows of {name} must be contiguous, but have strides {rows.stride()}")
        self._checked = inputs

    def _use(self, kv_caches: Sequence[KvCache]) -> tuple[int, int]:
        """Take the addresses of caches, unless they are those of the last call; returns their blocks and block size."""
        if len(kv_caches) != len(self._ffns):
            raise ValueError(f"KV caches of {len(kv_caches)} layers were given; expected {len(self._ffns)}")
        if not same(kv_caches, self._kv_caches):
            kv_heads, size = self._cache_shape
            blocks, _, block, _ = kv_caches[0][0].shape
            first = KvCache._make(kv_caches[0])
            dtype, width = (torch.int8, size + SCALE_BYTES) if first.in_int8 else (self.dtype, size)
            for cache in map(KvCache._make, kv_caches):
                for part in (cache.keys,) if cache.latent else cache:
                    check("a KV cache", part, (blocks, kv_heads, block, width), dtype, in_place=True)
                if check_cache(cache, size, self.dtype) != self._value_size:
                    raise ValueError(f"values of {cache.values.shape[-1]} numbers; expected {self._value_size}")
            self._int8_kv = int(first.in_int8)
            self._kv_caches = tuple(kv_caches)
            self._addresses = array("q", [tensor.data_ptr() for tensor in chain.from_iterable(kv_caches)])
        blocks, _, block, _ = self._kv_caches[0][0].shape
        return blocks, block

    def _bind_outputs(self, outputs: Sequence[LayerOutputs] | None, tokens: int) -> array[int]:
        """What C++ knows as LayerOutputs, one after the other; empty where nothing but the output is wanted."""
        if outputs and len(outputs) != len(self._ffns):
            raise ValueError(f"outputs of {len(outputs)} layers are wanted; expected {len(self._ffns)}")
        bound = array("q")
        if not outputs or same(outputs, [OUTPUT_ONLY] * len(outputs)):
            return bound
        for one, ffn in zip(outputs, self._ffns, strict=True):
            if (one.grouped or one.picked) and not ffn.k:
                raise ValueError("a layer that picks nothing can be asked for its output only")
            if isinstance(ffn, Moe) and (one.grouped or one.signal is not None):
                raise ValueError("a mixture of experts has no signal, and no grouped order")
            ffn.check_outputs(tokens, one.picks, one.weights, one.signal)
            bound.extend((int(one.grouped), address(one.picks), address(one.weights), address(one.signal)))
        return bound

    def _bind_runs(self, runs: Sequence[AdapterRun]) -> array[int]:
        """What C++ knows as AdapterRun, one after the other; runs keep their adapters."""
        found = [(checked(run, self._modules, self.dtype, len(self._ffns)), run.first, run.length) for run in runs]
        if found:
            self._modules = found[0][0].modules  # equal ones, so that the next are found to be the same
        return addresses(found)

    def _timers(self, count: int) -> Tensor | None:
        """Where time is added up, with room for so many threads: there may be more than there were."""
        if self._phase_ns is not None and (missing := kernels.PHASE_ROOM * (1 + count) - self._phase_ns.numel()) > 0:
            self._phase_ns = F.pad(self._phase_ns, (0, missing))
        return self._phase_ns

    def measure(self, on: bool) -> None:
        """Count from zero, or no more. Counting costs a clock reading per phase."""
        self._phase_ns = torch.zeros(kernels.PHASE_ROOM * (1 + threads()), dtype=torch.int64) if on else None

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by phase since `measure`: STACK_PHASES, and as parts of "ffn" for a thread FFN_PHASES."""
        if self._phase_ns is None:
            return {}
        own, *others = self._phase_ns.view(-1, kernels.PHASE_ROOM).double().mul(1e-9).unbind()
        within = torch.stack(others).mean(0).tolist()
        spent = dict(zip(kernels.STACK_PHASES, own.tolist(), strict=False))
        return spent | dict(zip(kernels.FFN_PHASES, within, strict=False))


def native_parts(layer: DecoderLayer) -> tuple[Linear, Linear, Ffn | Moe]:
    """A layer's projections and its FFN. Raises ValueError where one of them is not native."""
    qkv, out, ffn = layer.qkv, layer.out, layer.ffn
    if isinstance(qkv, Linear) and isinstance(out, Linear) and isinstance(ffn, Ffn | Moe):
        return qkv, out, ffn
    raise ValueError(f"a stack takes native layers only, but one has {qkv.backend}, {out.backend} and {ffn.backend}")


def modules_of(layer: DecoderLayer) -> Mapping[str, Module]:
    """What of a native layer adapters may add to. Attention's projections are none of it where keys hold the values."""
    qkv, out, ffn = native_parts(layer)
    size = layer.size or out.d // layer.heads
    query, keys = layer.heads * size, layer.kv_heads * size
    modules = {}
    if qkv.n == query + 2 * keys:
        modules = {"q": Module(query, qkv.d), "k": Module(keys, qkv.d, query), "v": Module(keys, qkv.d, query + keys)}
        modules["o"] = Module(out.n, out.d)
    return modules | {name: Module(*shape) for name, shape in ffn.module_shapes.items()}


def same(these: Sequence[object], those: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(these) == len(those) and all(map(operator.is_, these, those))
