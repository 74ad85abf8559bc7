"""A decoder up to its last block in one call of the native kernels: in between nothing is left to Python."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.native import address, check, check_angles, half, module

PHASES = ("embed", "norms", "projections", "kv writes", "attention", "ffn")  # of the calling thread
FFN_PHASES = ("router", "static", "compose", "waiting")  # of every thread within FFN layers
ROW = 8  # numbers that each of these tuples has room for

Pools = Sequence[tuple[Tensor, Tensor]]


class NormWeights(NamedTuple):
    """weight [d] and, of a LayerNorm, bias [d]."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class BlockLayers(NamedTuple):
    """What a block consists of. angles: as in `native.store_kv`."""

    norm1: NormWeights
    qkv: native.Linear
    out: native.Linear
    heads: int
    kv_heads: int
    angles: Tensor | None
    norm2: NormWeights
    ffn: native.Ffn | native.Moe


class Asked(NamedTuple):
    """What a DSC layer is asked for besides its output, as `native.Ffn` takes it, and its coefficients [B, k]."""

    grouped: bool = False
    picks: Tensor | None = None
    weights: Tensor | None = None
    signal: Tensor | None = None

    @classmethod
    def everything(cls, tokens: int, k: int) -> Asked:
        picks = torch.empty(tokens, k, dtype=torch.int32)
        return cls(False, picks, torch.empty(tokens, k), torch.empty(tokens))

    @property
    def picked(self) -> list[Tensor]:
        """What there is of picks, weights and signal."""
        return [tensor for tensor in self[1:] if isinstance(tensor, Tensor)]

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return int(self.grouped), address(self.picks), address(self.weights), address(self.signal)


NOTHING = Asked()


class Stack:
    """Blocks of native layers of one dtype. While `measure` is on, `spent` says where the time of calls goes.

    words [vocabulary, d], places [positions, d]: embeddings of tokens and, where they are learned, of positions.
    """

    def __init__(self, words: Tensor, places: Tensor | None, blocks: Sequence[BlockLayers]) -> None:
        first = blocks[0]
        self.d, self.dtype = first.qkv.d, first.qkv.dtype
        self._ffns = [b.ffn for b in blocks]
        self._kept: list[object] = list(blocks)
        self._pools: Pools = ()
        self._checked: tuple[Tensor, ...] = ()
        self._addresses = array("q")
        self._laps: Tensor | None = None
        size = first.out.d // first.heads
        self._pool = (first.kv_heads, size)
        if first.heads % first.kv_heads:
            raise ValueError(f"{first.heads} heads are not a multiple of {first.kv_heads} key-value heads")
        for table in (words, *(() if places is None else (places,))):
            check("an embedding", table, (table.shape[0], self.d), self.dtype)
        positions = [native.UNLIMITED if places is None else places.shape[0]]
        numbers: list[object] = []
        for b in blocks:
            self._check(b, first)
            if b.angles is not None:
                positions.append(check_angles(b.angles, size))
            projections = (b.qkv.packed, b.qkv.bias, b.out.packed, b.out.bias, b.angles)
            numbers += [*self._norm(b.norm1), *map(self._keep, projections), self.d, b.heads, b.kv_heads, size]
            numbers += [*self._norm(b.norm2), int(isinstance(b.ffn, native.Moe)), b.ffn.capsule]
            self._kept.append(b.ffn.capsule)
        embeddings = self._keep(words), self._keep(places), words.shape[0], min(positions)
        self.capsule = module().stack(half(self.dtype), *embeddings, *numbers)

    def _check(self, b: BlockLayers, first: BlockLayers) -> None:
        kv_heads, size = self._pool
        if (b.heads, b.kv_heads) != (first.heads, kv_heads):
            raise ValueError(f"{b.heads} heads, {b.kv_heads} for keys; the first block has {first.heads}, {kv_heads}")
        shapes = (b.qkv.n, b.qkv.d), (b.out.n, b.out.d)
        if shapes != (((b.heads + 2 * kv_heads) * size, self.d), (self.d, b.heads * size)) or b.ffn.d != self.d:
            raise ValueError(f"projections {shapes} do not fit {b.heads} heads of {size} and width {self.d}")
        dtypes = b.qkv.dtype, b.out.dtype, b.ffn.dtype
        if set(dtypes) != {self.dtype}:
            raise ValueError(f"layers of a block are {dtypes}; expected {self.dtype}")

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _norm(self, norm: NormWeights) -> tuple[int, int, float]:
        for vector in (norm.weight, *(() if norm.bias is None else (norm.bias,))):
            check("a norm's vector", vector, (self.d,), self.dtype)
        return self._keep(norm.weight), self._keep(norm.bias), norm.eps

    def __call__(
        self,
        ids: Tensor,
        slots: tuple[Tensor, Tensor, Tensor],
        tables: Tensor,
        contexts: Tensor,
        decodes: int,
        longest: int,
        chunks: Iterable[tuple[int, int, int, int]],
        pools: Pools,
        asked: Sequence[Asked] | None = None,
    ) -> Tensor:
        """The last block's output [T, d] for token ids int64 [T]; keys and values are written to the pools.

        slots: positions, blocks and offsets, int64 [T]; tables int64 [S, W]; contexts int64 [S]. The first `decodes`
        tokens are one of each of as many sequences, with contexts of at most `longest`; chunks (row of the tables,
        first token, tokens, context) hold the others. pools: per block [blocks, kv heads, block, size]. asked: per
        block, where all FFN layers are DSC's.
        """
        tokens, sequences = ids.shape[0], tables.shape[0]
        inputs = ids, *slots, tables, contexts
        if not same(inputs, self._checked):
            self._check_inputs(*inputs)
        pool, block = self._use(pools)
        if longest > tables.shape[1] * block:
            raise ValueError(f"tables {list(tables.shape)} of {block}-token blocks do not hold contexts of {longest}")
        flat, wanted = array("q", chain.from_iterable(chunks)), self._wanted(asked, tokens)
        out = torch.empty(tokens, self.d, dtype=self.dtype)
        if tokens:
            threads, addresses = native.threads(), self._addresses
            module().run_stack(
                *(self.capsule, out.data_ptr(), *(tensor.data_ptr() for tensor in inputs)),
                *(flat.buffer_info()[0], addresses.buffer_info()[0]),
                *(wanted.buffer_info()[0] if wanted else 0, address(self._counters(threads))),
                *(tokens, sequences, tables.shape[1], tables.stride(0), block, pool),
                *(decodes, longest, len(flat) // 4, threads),
            )
        return out

    def _check_inputs(self, *inputs: Tensor) -> None:
        """Raise ValueError for ids, positions, blocks, offsets, tables and contexts that no call could take."""
        *columns, tables, contexts = inputs
        tokens, (sequences, width) = columns[0].shape[0], tables.shape
        if any(c.shape != (tokens,) or c.dtype != torch.int64 or not c.is_contiguous() for c in columns):
            raise ValueError(f"ids and slots must be contiguous int64 [{tokens}]")
        check("tables", tables, (sequences, width), torch.int64)
        check("contexts", contexts, (sequences,), torch.int64, in_place=True)
        if tables.stride(1) != 1:
            raise ValueError(f"the rows of tables must be contiguous, but have strides {tables.stride()}")
        self._checked = inputs

    def _use(self, pools: Pools) -> tuple[int, int]:
        """Take the addresses of pools, unless they are those of the last call; returns their blocks and block size."""
        if len(pools) != len(self._ffns):
            raise ValueError(f"pools of {len(pools)} blocks were given; expected {len(self._ffns)}")
        if not same(pools, self._pools):
            kv_heads, size = self._pool
            blocks, _, block, _ = pools[0][0].shape
            for pool in chain.from_iterable(pools):
                check("a pool", pool, (blocks, kv_heads, block, size), self.dtype, in_place=True)
            self._pools = tuple(pools)
            self._addresses = array("q", [pool.data_ptr() for pool in chain.from_iterable(pools)])
        blocks, _, block, _ = self._pools[0][0].shape
        return blocks, block

    def _wanted(self, asked: Sequence[Asked] | None, tokens: int) -> array[int]:
        if asked and len(asked) != len(self._ffns):
            raise ValueError(f"{len(asked)} blocks are asked; expected {len(self._ffns)}")
        if not asked or same(asked, [NOTHING] * len(asked)):
            return array("q")
        for one, ffn in zip(asked, self._ffns, strict=True):
            if not isinstance(ffn, native.Ffn) or not ffn.atoms:
                raise ValueError("only DSC layers can be asked for more than their output")
            ffn.check_asked(tokens, one.picks, one.weights, one.signal)
        return array("q", chain.from_iterable(one.numbers for one in asked))

    def _counters(self, threads: int) -> Tensor | None:
        """Where time is counted, with room for so many threads: there may be more than there were."""
        if self._laps is not None and (missing := ROW * (1 + threads) - self._laps.numel()) > 0:
            self._laps = F.pad(self._laps, (0, missing))
        return self._laps

    def measure(self, on: bool) -> None:
        """Count from zero, or no more. Counting costs a clock reading per phase."""
        self._laps = torch.zeros(ROW * (1 + native.threads()), dtype=torch.int64) if on else None

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by phase since `measure`: PHASES in order, those of FFN_PHASES as parts of "ffn" for a thread."""
        if self._laps is None:
            return {}
        own, *threads = self._laps.view(-1, ROW).double().mul(1e-9).unbind()
        within = torch.stack(threads).mean(0).tolist()
        return dict(zip(PHASES, own.tolist(), strict=False)) | dict(zip(FFN_PHASES, within, strict=False))


def same(these: Sequence[object], those: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(these) == len(those) and all(map(operator.is_, these, those))
