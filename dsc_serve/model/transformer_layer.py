"""One layer of a decoder: attention and an FFN, with norms where its kind has them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.weights import (
    Adapted,
    DecoderLayer,
    KvCache,
    NormWeights,
)
from dsc_serve.model.attention import Attention
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn import FfnLayer
from dsc_serve.model.ffn.picks import PickingFfn, Picks
from dsc_serve.model.tensor_shapes import parameter_counts as parameter_counts
from dsc_serve.model.tensor_shapes import tensor_shapes as tensor_shapes

Branch = Callable[..., Tensor]  # an FFN: x [T, d] and a residual → [T, d]


class Norm:
    """LayerNorm or RMSNorm over the last dimension, plus a residual where one is given; statistics in float32."""

    def __init__(self, config: ModelConfig, weight: Tensor, bias: Tensor | None) -> None:
        self.weights = NormWeights(weight, bias, config.norm_eps)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.norm(x, self.weights, residual)


class TransformerLayer:
    """One layer; `config.norms` says where its norms stand. norm1 belongs to attention, norm2 to the FFN.

    behind: the norms of what these give, where norms stand around branches. index: of the layer.
    """

    def __init__(
        self,
        norm1: Norm,
        attention: Attention,
        norm2: Norm,
        ffn: FfnLayer,
        index: int,
        behind: tuple[Norm, Norm] | None = None,
    ) -> None:
        self.norm1, self.attention, self.norm2, self.ffn, self.index = norm1, attention, norm2, ffn, index
        self.behind = behind
        self._run = ARRANGEMENTS[attention.config.norms]

    def __call__(self, x: Tensor, batch: StepBatch, cache: KvCache) -> Tensor:
        """x [T, d] → [T, d]."""
        return self._run(self, x, batch, cache, self._adapted(batch), self.ffn)

    def picking(
        self, x: Tensor, batch: StepBatch, cache: KvCache, ffn: PickingFfn | None, picks: list[Picks]
    ) -> Tensor:
        """The same; what its FFN picked, which is given again where it picks anything, is appended."""
        if ffn is None:
            return self(x, batch, cache)

        def recorded(x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
            out, picked = ffn.routed(x, residual, adapted=adapted)
            picks.append(picked)
            return out

        return self._run(self, x, batch, cache, self._adapted(batch), recorded)

    def _adapted(self, batch: StepBatch) -> Adapted | None:
        return Adapted(batch.runs, self.index) if batch.runs else None

    def described(self) -> DecoderLayer:
        """What it consists of, for those who compute all blocks in one call."""
        c = self.attention.config
        attended, fed = (None, None) if self.behind is None else (norm.weights for norm in self.behind)
        return DecoderLayer(
            norms=c.norms,
            attention_norm=self.norm1.weights,
            attended_norm=attended,
            fed_norm=fed,
            size=c.head_dim,
            scope=self.attention.scope,
            table=self.attention.group,
            qkv=self.attention.qkv,
            out=self.attention.out,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            qk_norm=self.attention.qk_norm,
            cos_sin_cache=self.attention.cos_sin_cache,
            ffn_norm=self.norm2.weights,
            ffn=self.ffn.layer,
        )


Arrangement = Callable[[TransformerLayer, Tensor, StepBatch, KvCache, Adapted | None, Branch], Tensor]


def norms_before(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    x = layer.attention(layer.norm1(x), batch, cache, x, adapted)
    return ffn(layer.norm2(x), residual=x, adapted=adapted)


def norms_after(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    x = layer.norm1(layer.attention(x, batch, cache, None, adapted), residual=x)
    return layer.norm2(ffn(x, adapted=adapted), residual=x)


def parallel(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    attended = layer.attention(layer.norm1(x), batch, cache, x, adapted)
    return ffn(layer.norm2(x), residual=attended, adapted=adapted)


def parallel_shared(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    normed = layer.norm1(x)
    return ffn(normed, residual=layer.attention(normed, batch, cache, x, adapted), adapted=adapted)


def around(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, adapted: Adapted | None, ffn: Branch
) -> Tensor:
    assert layer.behind is not None
    attended, fed = layer.behind
    x = attended(layer.attention(layer.norm1(x), batch, cache, None, adapted), residual=x)
    return fed(ffn(layer.norm2(x), adapted=adapted), residual=x)


ARRANGEMENTS: dict[str, Arrangement] = {
    "before": norms_before,
    "after": norms_after,
    "parallel": parallel,
    "shared": parallel_shared,
    "around": around,
}
