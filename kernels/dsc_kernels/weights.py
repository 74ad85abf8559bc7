"""What layers and operators are made of and called with, whichever backend computes them: `plain`, `native` or `gpu`.

Tensors of one layer have one dtype and device, unless a field says otherwise. A quantised weight's dtype is that of the
layer which it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from dsc_kernels.quantised import Weight

if TYPE_CHECKING:
    from dsc_kernels.backend import BoundAdapter, Layer, Linear

Activation = Literal["none", "gelu", "gelu_tanh", "silu"]
# Where a layer's norms stand: before each branch; after it and before the sum; before both branches, which lie beside
# each other; the same with one norm for both, which is then that of attention; one before and one after each branch.
NormPlaces = Literal["before", "after", "parallel", "shared", "around"]
Scoring = Literal["softmax", "sigmoid"]

SCALE_BYTES = 4  # of a row in a cache of int8
MAX_PICKS = 64  # rows that a token may pick where kernels of ours compute


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """W_2 act(W_1 x), or W_2 (act(W_g x) ⊙ W_1 x) with a gate, each product plus its bias where it has one.

    Of one layer, or of one expert, which has no biases.
    """

    up: Weight  # W_1 [hidden, d]
    gate: Weight | None  # W_g [hidden, d], None unless gated
    down: Weight  # W_2 [d, hidden]
    up_bias: Tensor | None = None  # [hidden]
    gate_bias: Tensor | None = None  # [hidden]
    down_bias: Tensor | None = None  # [d]

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.up_bias, self.gate_bias, self.down_bias


def gates_of(experts: Sequence[MlpWeights]) -> list[Weight] | None:
    """The experts' gates, None where they have none.

    Raises ValueError where only some have one, for no experts, and for experts with biases.
    """
    if any(bias is not None for expert in experts for bias in expert.biases):
        raise ValueError("an expert has a bias; experts have none")
    gates = [expert.gate for expert in experts if expert.gate is not None]
    if len(gates) not in (0, len(experts)) or not experts:
        raise ValueError(f"{len(gates)} of {len(experts)} experts have a gate; all must, or none")
    return gates or None


@dataclass(frozen=True, eq=False)
class Router:
    """What scores atoms, adapters or experts. Its weight may come in any wider dtype than the layer's."""

    weight: Weight  # [rows, d], folded with its norm (`reference.fold_router_norm`); quantised, without a compensation
    bias: Tensor | None = None  # [rows], of any dtype
    norm_eps: float | None = None  # of the folded norm, None without one
    choice_bias: Tensor | None = None  # [rows], added to experts' scores where they are picked, and nowhere else


@dataclass(frozen=True, eq=False)
class AtomBank:
    """Rank-1 atoms, or adapters of `FfnOptions.rank` atoms each, one after the other."""

    u: Weight  # [atoms · max(rank, 1), d]; quantised, in 8 bits without a compensation
    v: Weight  # the same
    gamma: Tensor  # [d] or [1], of any dtype


@dataclass(frozen=True, kw_only=True)
class FfnOptions:
    """How an FFN layer computes; all but the activation matter only with a router."""

    activation: Activation
    k: int = 0  # atoms or adapters picked per token
    rank: int = 0  # atoms of an adapter: a mixture of LoRAs; 0: atoms are picked by themselves, DSC
    tau: float = 0.0  # logits are truncated to ±tau
    eps: float = 0.0  # of the coefficients' denominator
    silent: bool = False  # whether γ is 0 and nothing is composed, but for tokens with a `Tuning`: others pick nothing


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """An expert that every token runs through; its width is its own."""

    mlp: MlpWeights  # gated where the others are
    gate: Tensor | None = None  # [d]: its output is multiplied by sigmoid(gate · x); None: it is not


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """How a mixture of experts computes."""

    activation: Activation
    k: int  # experts picked per token
    normalize: bool = False  # whether the weights of those sum to 1, as with a softmax over their logits alone
    scoring: Scoring = "softmax"  # what makes scores of logits: over all experts, or of each by itself
    groups: int = 1  # into which the experts are divided
    groups_used: int = 1  # of these may be picked from, those of the best scores
    group_picks: int = 1  # the best experts of a group whose scores, added, are the group's: 1 or 2
    weight_scale: float = 1.0  # what the weights are multiplied by at the end

    def check(self, experts: int) -> None:
        """Raise ValueError for groups that so many experts cannot be picked from."""
        if self.groups < 1 or experts % self.groups:
            raise ValueError(f"{experts} experts cannot be divided into {self.groups} groups")
        if not 1 <= self.groups_used <= self.groups:
            raise ValueError(f"groups_used is {self.groups_used}; it must be between 1 and {self.groups}")
        if self.groups > 1 and self.k > self.groups_used * (experts // self.groups):
            raise ValueError(f"k is {self.k}; {self.groups_used} of {self.groups} groups have fewer experts")
        if self.group_picks not in (1, 2) or self.group_picks > experts // self.groups:
            raise ValueError(f"group_picks is {self.group_picks}; it must be 1 or 2, and no more than a group has")


@dataclass(frozen=True, eq=False)
class NormWeights:
    """RMSNorm, or LayerNorm where there is a bias."""

    weight: Tensor  # [d]
    bias: Tensor | None  # [d]
    eps: float


@dataclass(frozen=True, eq=False)
class QkNorm:
    """RMSNorm of queries and keys before they are turned: of each head, or of all heads of a token together.

    Where values lie within keys, it is of the numbers of each key that are values, and there is none of queries.
    """

    query: Tensor | None  # [size], or [heads · size]
    key: Tensor  # [size], or [kv heads · size], or [value size]
    eps: float


class Scope(NamedTuple):
    """What of its context a token sees, and how scores are bounded."""

    window: int = 0  # the last so many positions, its own among them; 0: all
    cap: float = 0.0  # scores become cap · tanh(score / cap); 0: they stay


WHOLE = Scope()


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderLayer:
    """What one layer of a decoder consists of."""

    norms: NormPlaces = "before"
    attention_norm: NormWeights
    attended_norm: NormWeights | None = None  # of what attention gives, and of what the FFN does, where norms are
    fed_norm: NormWeights | None = None  # "around"
    qkv: Linear  # [(heads + 2 · kv heads) · size, d], without values [(heads + kv heads) · size, d]
    out: Linear  # [d, heads · value size]
    heads: int
    kv_heads: int
    size: int | None = None  # of a query and a key; None: of a value, too
    scope: Scope = WHOLE
    table: int = 0  # which of a step's tables of KV blocks is its own
    qk_norm: QkNorm | None = None
    cos_sin_cache: Tensor | None  # float32 [positions, 2, turned / 2]; None where queries and keys are not turned
    ffn_norm: NormWeights
    ffn: Layer


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = scale · up diag(middle) core down, what an adapter adds to one module. Tensors are never written to."""

    down: Tensor  # A [rank, in], with a core [inner, in]; float32 or bfloat16
    up: Tensor  # B [out, rank], the same
    scale: float = 1.0
    middle: Tensor | None = None  # float32 [rank]; None: all 1
    core: Tensor | None = None  # [rank, inner]; None: 1

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def nbytes(self) -> int:
        parts = (self.down, self.up, self.middle, self.core)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def coefficients(self) -> Tensor:
        """scale · middle, float32 [rank], where the matrices are."""
        device = self.down.device
        middle = torch.ones(self.rank, device=device) if self.middle is None else self.middle.to(device, torch.float32)
        return middle * self.scale


class Pair(NamedTuple):
    """Of a basis, what many adapters of one module share: ΔW = scale · up core down, each with a core of its own."""

    down: Tensor  # [inner, in], float32 or bfloat16
    up: Tensor  # [out, rank], the same


@dataclass(frozen=True, eq=False)
class Core:
    """What an adapter adds to a module on the pair that its basis has there."""

    matrix: Tensor  # [rank, inner], float32 or bfloat16
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.matrix.shape[0]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


Update = LowRank | Core


@dataclass(frozen=True, eq=False)
class Tuning:
    """What a tenant of a DSC layer's bank has of its own, instead of the layer's. Tensors are never written to."""

    bias: Tensor  # float32 [atoms]: the router's, with what its folded norm adds
    gamma: Tensor  # float32 [d]

    @property
    def nbytes(self) -> int:
        return self.bias.nbytes + self.gamma.nbytes


NOT_TUNED: Mapping[int, Tuning] = {}  # by layer


Place = tuple[int, str]  # a layer, and one of its modules that adapters may add to
MODULES = ("q", "k", "v", "o", "gate", "up", "down")  # of attention, and of the MLP that every token takes
ATOMS = "atoms"  # a layer's bank, of which a tenant has no matrices but a `Tuning`


class Module(NamedTuple):
    """What of a layer an adapter may add to: W [out, into], rows of a product from the row `at` on.

    Of a bank these are its atoms and their width.
    """

    out: int
    into: int
    at: int = 0


class AdapterRun(NamedTuple):
    """Neighbouring tokens of a step that have the same adapter."""

    adapter: BoundAdapter
    first: int
    length: int


class Adapted(NamedTuple):
    """The adapters of a step's tokens, in their order, in one layer."""

    runs: Sequence[AdapterRun]
    layer: int


ChunkPlace = tuple[int, int, int, int]  # new tokens of one sequence: its table's row, the first, how many, the context


class KvCache(NamedTuple):
    """One layer's keys and values, in blocks: in the layer's dtype, or in int8.

    In int8 a token's row of a head is its numbers and, behind them, what 1 is worth: a float32 in SCALE_BYTES more.
    """

    keys: Tensor  # [blocks, kv heads, block, size], contiguous; in int8 [blocks, kv heads, block, size + SCALE_BYTES]
    values: Tensor  # the same, or the last `value size` numbers of each key: a view of `keys`

    @classmethod
    def within(cls, keys: Tensor, size: int) -> KvCache:
        """One whose values are the last `size` numbers of its keys."""
        end = keys.shape[-1] - (SCALE_BYTES if keys.dtype == torch.int8 else 0)
        return cls(keys, keys[..., end - size : end])

    @property
    def latent(self) -> bool:
        """Whether values lie within keys, and are not written by themselves."""
        return self.values.shape[-1] < self.keys.shape[-1]

    @property
    def in_int8(self) -> bool:
        return self.keys.dtype == torch.int8


class Slots(NamedTuple):
    """Where a step's T tokens stand, and where their keys and values go."""

    positions: Tensor  # int64 [T]
    blocks: Tensor  # int64 [T], of the KV cache; of a whole stack [tables, T]
    offsets: Tensor  # int64 [T], within their blocks


class LayerOutputs(NamedTuple):
    """What a layer that picks gives besides its output in a step of T tokens, and how a DSC layer composes.

    A mixture of experts picks experts and has no signal; a mixture of LoRAs picks adapters.
    """

    grouped: bool = False  # whether tokens are composed in an order in which neighbours share atoms
    picks: Tensor | None = None  # int32 [≥ T, k]: gets what was picked
    weights: Tensor | None = None  # float32 [≥ T, k]: gets their coefficients
    signal: Tensor | None = None  # float32 [≥ T]

    @classmethod
    def everything(cls, tokens: int, k: int, signal: bool = True, device: torch.device | None = None) -> LayerOutputs:
        """Room for all there is."""
        picks = torch.empty(tokens, k, dtype=torch.int32, device=device)
        strengths = torch.empty(tokens, device=device) if signal else None
        return cls(False, picks, torch.empty(tokens, k, device=device), strengths)

    @property
    def picked(self) -> list[Tensor]:
        """What there is of picks, weights and signal."""
        return [tensor for tensor in self[1:] if isinstance(tensor, Tensor)]


OUTPUT_ONLY = LayerOutputs()
