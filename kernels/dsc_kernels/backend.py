"""What a backend offers, and what the layers it makes can be asked: `plain`, `native` and `gpu.layers` are backends."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dsc_kernels.quantised import Weight
from dsc_kernels.weights import (
    NOT_TUNED,
    WHOLE,
    Activation,
    Adapted,
    AdapterRun,
    AtomBank,
    ChunkPlace,
    DecoderLayer,
    FfnOptions,
    KvCache,
    LayerOutputs,
    LowRank,
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

UNROUTED = "a routed layer needs a router and a bank of atoms, another layer neither"


class Linear(Protocol):
    """out = act(x Wᵀ + bias) + residual, W [n, d]."""

    @property
    def backend(self) -> str:
        """The name of the backend that computes it."""

    def __call__(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [B, d] → [B, n] in x's dtype, or in out_dtype."""


class Head(Linear, Protocol):
    """A linear layer that also tells where its outputs are largest."""

    @property
    def screened(self) -> bool:
        """Whether `argmax` screens the weight in int8."""

    def argmax(self, x: Tensor) -> Tensor:
        """Where each row of x Wᵀ + bias has its largest output, the first of equal ones: x [B, d] → int64 [B]."""


class Basis(Protocol):
    """What many adapters of a decoder share, ready for its layers; they hold it. Nothing changes it."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""


class BoundAdapter(Protocol):
    """Updates of a decoder's modules, ready for its layers. Nothing changes it, and it may go when nobody holds it."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, without those of others that it is the sum of, and of its bases."""

    @property
    def bases(self) -> Sequence[Basis]:
        """What it shares with others, each once."""

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        """What it adds to a module, as plain tensors: all of these."""

    @property
    def tunings(self) -> Mapping[int, Tuning]:
        """By layer, what it has of its own of the banks."""


class Layer(Protocol):
    """x [B, d] → the layer's output plus residual, [B, d].

    adapted: adapters that add to the products of the MLP that every token takes.
    """

    @property
    def backend(self) -> str:
        """The name of the backend that computes it."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor: ...


class OwningLayer(Layer, Protocol):
    """A layer built of plain weights."""

    @property
    def owns_weights(self) -> bool:
        """Whether it has copied them, so that they may go."""


class Ffn(OwningLayer, Protocol):
    """A static MLP plus a routed composition of rank-1 atoms: DSC; with a rank, a mixture of LoRAs; without, dense."""

    @property
    def screened(self) -> bool:
        """Whether its router is screened in int8."""

    @property
    def rescored(self) -> tuple[int, int]:
        """Router rows that screening could not rule out so far, and the tokens that this was for; 0 where none is."""

    def screens(self, tokens: int) -> bool:
        """Whether its router is screened in a step of so many tokens."""

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

        grouped: compose the tokens in an order in which neighbours share atoms.
        picks int32 [≥ B, k], signal float32 [≥ B]: where given, the atoms picked and the signal are written there.
        """

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms [B, k], coefficients [B, k] and signal [B] in float32.

        Raises ValueError where the layer has no router.
        """


class Moe(OwningLayer, Protocol):
    """A mixture of experts."""

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and what was picked: experts [B, k], the best choice first, and weights float32 [B, k]."""


class Stack(Protocol):
    """All layers of a decoder in one call."""

    def takes(self, kv_caches: Sequence[KvCache], runs: Sequence[AdapterRun]) -> bool:
        """Whether it computes steps with these caches and adapters; they are computed layer by layer otherwise."""

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
        """The last layer's output [T, d] of single tokens, the first `decodes`, and of chunks.

        drafted: of the first chunks, which are a token and its drafts. Where it costs nothing each of their tokens
        attends as a single one, to the same bits.
        """


@runtime_checkable
class MeasuredStack(Stack, Protocol):
    """One that counts: while `measure` is on, `spent` says where the time of calls goes."""

    def measure(self, on: bool) -> None: ...

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by phase since `measure`."""


class Backend(Protocol):
    """A module whose layers and operators serve tensors of some dtypes on some devices."""

    @property
    def name(self) -> str: ...

    @property
    def dequantises(self) -> Collection[str]:
        """Which of a model's "router", "bank" and "experts" it has as floating-point numbers, however they come."""

    def Linear(self, weight: Weight, bias: Tensor | None = None) -> Linear: ...  # noqa: N802  a class of the module

    def Head(self, weight: Weight, bias: Tensor | None = None) -> Head: ...  # noqa: N802

    def Ffn(  # noqa: N802
        self, mlp: MlpWeights, options: FfnOptions, router: Router | None = None, bank: AtomBank | None = None
    ) -> Ffn:
        """Raises ValueError for a router without a bank or the other way round, and for what does not fit."""

    def Moe(  # noqa: N802
        self, router: Router, experts: Sequence[MlpWeights], options: MoeOptions, shared: SharedExpert | None = None
    ) -> Moe: ...

    def basis(
        self,
        pairs: Mapping[Place, Pair],
        modules: Sequence[Mapping[str, Module]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Basis:
        """What adapters of a decoder whose layers have these modules share, for its dtype and device.

        Raises ValueError for what does not fit.
        """

    def adapter(
        self,
        updates: Mapping[Place, Update],
        modules: Sequence[Mapping[str, Module]],
        dtype: torch.dtype,
        device: torch.device,
        basis: Basis | None = None,
        tunings: Mapping[int, Tuning] = NOT_TUNED,
    ) -> BoundAdapter:
        """Updates of a decoder whose layers have these modules, for its dtype and device; tunings by layer.

        basis: made for the same, of which there are cores. Raises ValueError for what does not fit.
        """

    def summed(self, parts: Sequence[tuple[BoundAdapter, float]]) -> BoundAdapter:
        """Adapters of one decoder, made here, with weights as one. Raises ValueError where two of them have tunings."""

    def stack(
        self,
        token_embedding: Weight,
        position_embedding: Tensor | None,
        layers: Sequence[DecoderLayer],
        embedding_scale: float = 1.0,
    ) -> Stack | None:
        """Embeddings [vocabulary, d] and [positions, d], and all layers in one call; None where that is not offered.

        embedding_scale: what tokens' embeddings are multiplied by.
        """

    def compose_rows(
        self, static: Tensor, x: Tensor, picked: Tensor, weights: Tensor, bank: AtomBank, rank: int = 0
    ) -> Tensor:
        """static [B, d] plus what picked rows make of x [B, d], in x's dtype: (Σ_j (x · u_j) w_j v_j) ⊙ γ.

        picked integers and weights float32 [B, k]: atoms; with a rank adapters, each of so many atoms.
        """

    def norm(self, x: Tensor, weights: NormWeights, residual: Tensor | None = None) -> Tensor:
        """Rows x [T, d] normed in float32, plus residual [T, d] where one is given."""

    def store_kv(
        self,
        qkv: Tensor,
        heads: int,
        cos_sin_cache: Tensor | None,
        slots: Slots,
        cache: KvCache,
        qk_norm: QkNorm | None = None,
    ) -> None:
        """Write new tokens' keys and values to the cache; queries (in place) and keys are normed and turned first.

        qkv [T, heads + 2 · kv heads, size], without values [T, heads + kv heads, size] where they lie within the keys;
        cos_sin_cache float32 [positions, 2, turned / 2], None: nothing is turned.
        """

    def decode_attention(
        self,
        q: Tensor,
        cache: KvCache,
        tables: Tensor,
        contexts: Tensor,
        max_context_len: int,
        scale: float,
        scope: Scope = WHOLE,
    ) -> Tensor:
        """Attention of one new token per sequence over its cached keys and values.

        q [S, heads, size] (rows may be strided); tables [S, W] and contexts [S] integers, contexts at most
        max_context_len.
        What of a table lies before the window may be any block. Returns [S, heads, value size].
        """

    def places_chunks(self, cache: KvCache) -> bool:
        """Whether attention over such a cache, and a stack, take `chunks.PlacedChunks` for chunks, which lie where
        they like behind single tokens of which the last may have empty contexts."""

    def chunks_attention(
        self,
        q: Tensor,
        cache: KvCache,
        tables: Tensor,
        chunks: Iterable[ChunkPlace],
        out: Tensor,
        scale: float,
        scope: Scope = WHOLE,
    ) -> None:
        """Attention of the last tokens of some sequences, each up to itself, written to their rows of out.

        q [T, heads, size] (rows may be strided), of which a chunk's n tokens are at positions context − n … context − 1
        of the sequence whose table is its row of tables [S, W]; what of that lies before the windows may be any block.
        out [T, heads, value size], contiguous.
        """
