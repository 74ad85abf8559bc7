"""What layers and operators are made of and called with, whichever backend computes them: `plain`, `native` or `gpu`.

Tensors of one layer have one dtype and device, unless a field says otherwise. A quantised weight's dtype is that of the
layer which it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from dsc_kernels.quantised import Weight

if TYPE_CHECKING:
    from dsc_kernels.backend import Layer, Linear

Activation = Literal["none", "gelu", "gelu_tanh", "silu"]
# Where a layer's norms stand: before each branch; after it and before the sum; before both branches, which lie beside
# each other; the same with one norm for both, which is then that of attention.
NormPlaces = Literal["before", "after", "parallel", "shared"]

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


@dataclass(frozen=True, eq=False)
class NormWeights:
    """RMSNorm, or LayerNorm where there is a bias."""

    weight: Tensor  # [d]
    bias: Tensor | None  # [d]
    eps: float


@dataclass(frozen=True, eq=False)
class QkNorm:
    """RMSNorm of queries and keys before they are turned: of each head, or of all heads of a token together."""

    query: Tensor  # [size], or [heads · size]
    key: Tensor  # [size], or [kv heads · size]
    eps: float


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderLayer:
    """What one layer of a decoder consists of."""

    norms: NormPlaces = "before"
    attention_norm: NormWeights
    qkv: Linear  # [(heads + 2 · kv heads) · size, d]
    out: Linear  # [d, heads · size]
    heads: int
    kv_heads: int
    qk_norm: QkNorm | None = None
    cos_sin_cache: Tensor | None  # float32 [positions, 2, turned / 2]; None where queries and keys are not turned
    ffn_norm: NormWeights
    ffn: Layer


SCALE_BYTES = 4


class KvCache(NamedTuple):
    """One layer's keys and values, in blocks: in the layer's dtype, or in int8.

    In int8 a token's row of a head is its numbers and, behind them, what 1 is worth: a float32 in SCALE_BYTES more.
    """

    keys: Tensor  # [blocks, kv heads, block, size], contiguous; in int8 [blocks, kv heads, block, size + SCALE_BYTES]
    values: Tensor  # the same

    @property
    def in_int8(self) -> bool:
        return self.keys.dtype == torch.int8


class Slots(NamedTuple):
    """Where a step's T tokens stand, and where their keys and values go."""

    positions: Tensor  # int64 [T]
    blocks: Tensor  # int64 [T], of the KV cache
    offsets: Tensor  # int64 [T], within their blocks


class LayerOutputs(NamedTuple):
    """What a DSC layer gives besides its output in a step of T tokens, and how it composes."""

    grouped: bool = False  # whether tokens are composed in an order in which neighbours share atoms
    picks: Tensor | None = None  # int32 [≥ T, k]: gets the atoms picked
    weights: Tensor | None = None  # float32 [≥ T, k]: gets their coefficients
    signal: Tensor | None = None  # float32 [≥ T]

    @classmethod
    def everything(cls, tokens: int, k: int) -> LayerOutputs:
        """Room for all there is."""
        picks = torch.empty(tokens, k, dtype=torch.int32)
        return cls(False, picks, torch.empty(tokens, k), torch.empty(tokens))

    @property
    def picked(self) -> list[Tensor]:
        """What there is of picks, weights and signal."""
        return [tensor for tensor in self[1:] if isinstance(tensor, Tensor)]


OUTPUT_ONLY = LayerOutputs()
