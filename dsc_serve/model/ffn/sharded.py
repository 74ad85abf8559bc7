"""The FFN kinds where several ranks share a model: each computes its part, and the parts are summed.

MLPs and experts are divided by width; the gates of mixtures of experts are every rank's. Banks are divided by rows:
each rank finds the best of its own, all learn what all have found, and each composes those of the picked that it has.
Every layer sums [T, d] once, and gets its residual after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dsc_kernels import ops, plain, plan, reference
from dsc_kernels.picking import select
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Adapted, AtomBank, FfnOptions, MlpWeights, Router
from dsc_serve.model.config import CheckpointError, DscConfig, ModelConfig, MoloraConfig
from dsc_serve.model.exchange import RankExchange
from dsc_serve.model.ffn import FfnLayer
from dsc_serve.model.ffn.dense import DenseFfn
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.ffn.moe import MoeFfn
from dsc_serve.model.ffn.molora import MoloraFfn
from dsc_serve.model.ffn.picks import Picks
from dsc_serve.model.placement import Placement
from dsc_serve.model.quantised_tensor import as_tensor
from dsc_serve.model.sharding import rank_config
from dsc_serve.model.summed import whole


class BankRows:
    """The rows of a bank, and of its router, that a rank has: atoms, or adapters of `options.rank` atoms each.

    rows: which of all they are. Every rank asks the same of its own at the same time.
    """

    def __init__(
        self, router: Router, bank: AtomBank, options: FfnOptions, rows: range, exchange: RankExchange
    ) -> None:
        dtype, device = bank.u.dtype, bank.u.device
        # As layers that route by themselves hold it: `ops`.
        exact = torch.float32 if ops.backend(dtype, device).name == plain.NAME else dtype
        self._router = ops.linear(as_tensor(router.weight, exact).contiguous())
        self._dtype, self._bias, self._norm_eps = exact, router.bias, router.norm_eps
        self._bank = AtomBank(bank.u, bank.v, bank.gamma.float())
        self._options, self._rows, self._exchange = options, rows, exchange

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of all ranks' rows the k best for each of x [B, d], the same everywhere: their truncated logits float32 and
        which they are int64, [B, k] each.

        Ties go to the lower row: each rank's candidates come in this order, and those of lower ranks first.
        """
        k, tau = self._options.k, self._options.tau
        logits, own = select(self._logits(x), k, tau)
        found = torch.stack(((own + self._rows.start).int(), logits.view(torch.int32)))
        rows, logits = self._exchange.gather(found).permute(1, 2, 0, 3).flatten(2).unbind()  # [B, ranks · k] each
        best, columns = select(logits.contiguous().view(torch.float32), k, tau)
        return best, rows.gather(1, columns).long()

    def composed(self, static: Tensor, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """static [B, d] plus what this rank's own of the picked rows make, with weights float32 [B, k]."""
        own = rows - self._rows.start
        has = (own >= 0) & (own < len(self._rows))
        own, weights = torch.where(has, own, 0), torch.where(has, weights, 0.0)
        return ops.compose(static, x, own, weights, self._bank, self._options.rank)

    def _logits(self, x: Tensor) -> Tensor:
        """Of this rank's rows, float32 [B, rows]; see `reference.router_logits`."""
        logits = self._router(x.to(self._dtype), out_dtype=torch.float32)
        if self._norm_eps is not None:
            logits = logits * reference.reciprocal_std(x.float(), self._norm_eps)
        return logits if self._bias is None else logits + self._bias


class WithBankRows:
    """What layers have in common whose bank is divided by rows; count: of the rows, atoms or adapters, of all ranks."""

    _exchange: RankExchange
    _count: int

    def _layer(self, mlp: MlpWeights, options: FfnOptions, router: Router, bank: AtomBank) -> ops.Ffn:
        rows = self._exchange.shard.part(self._count)
        self._own = BankRows(router, bank, options, rows, self._exchange)
        return ops.ffn(mlp, FfnOptions(activation=options.activation))


class ShardedDsc(WithBankRows, DscFfn):
    """A DSC layer of which this rank has some atoms; u, v and gamma are its own. config: of the whole model."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        assert isinstance(config.ffn, DscConfig)
        self._exchange, self._count = place.exchange, config.ffn.num_atoms
        super().__init__(rank_config(config, place.exchange.shard), tensors, place)
        if self.silent:
            raise CheckpointError("gamma: 0 throughout, of a bank for its tenants alone, which ranks do not share")

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return self.routed(x, residual, adapted=adapted)[0]

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Picks]:
        logits, atoms = self._own.picked(x)
        weights, signal = reference.coefficients(logits, self.config.eps)
        own = self._own.composed(self.layer(x, adapted=adapted), x, atoms, weights)
        return whole(self._exchange, own, residual), self.record((atoms.int(), weights, signal))

    @property
    def shape(self) -> plan.Shape:
        """Of all ranks' together, as picks name their atoms."""
        return replace(super().shape, atoms=self._count)


class ShardedMolora(WithBankRows, MoloraFfn):
    """A mixture of LoRAs of which this rank has some adapters. config: of the whole model."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        assert isinstance(config.ffn, MoloraConfig)
        self._exchange, self._count = place.exchange, config.ffn.num_adapters
        super().__init__(rank_config(config, place.exchange.shard), tensors, place)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return self.routed(x, residual, adapted=adapted)[0]

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Picks]:
        logits, rows = self._own.picked(x)
        gates = logits.softmax(dim=1)
        own = self._own.composed(self.layer(x, adapted=adapted), x, rows, gates)
        return whole(self._exchange, own, residual), self.record((rows.int(), gates))


class ShardedMoe(MoeFfn):
    """A mixture of experts, of each of which this rank has a part of the width. config: of the whole model."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        self._exchange = place.exchange
        super().__init__(rank_config(config, place.exchange.shard), tensors, place)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return whole(self._exchange, super().__call__(x, adapted=adapted), residual)

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Picks]:
        own, picks = super().routed(x, adapted=adapted)
        return whole(self._exchange, own, residual), picks


class ShardedDense(DenseFfn):
    """A dense FFN of which this rank has a part of the width. config: of the whole model."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], place: Placement) -> None:
        self._exchange = place.exchange
        super().__init__(rank_config(config, place.exchange.shard), tensors, place)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        return whole(self._exchange, super().__call__(x, adapted=adapted), residual)


SHARDED: dict[str, type[FfnLayer]] = {
    "dsc": ShardedDsc,
    "moe": ShardedMoe,
    "molora": ShardedMolora,
    "dense": ShardedDense,
}
