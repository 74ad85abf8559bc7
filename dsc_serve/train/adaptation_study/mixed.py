"""One LoRA of all texts together: what of a gain is general."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.model.schema import Size
from dsc_serve.train.adapt.network import AdaptedNetwork
from dsc_serve.train.adapt.settings import AdaptSettings
from dsc_serve.train.adapt.tenants import fresh_updates
from dsc_serve.train.adapt.trainer import ADAPTERS, AdapterTrainer

MIXED = "mixed"  # what the adapter is called


class MixedSettings(AdaptSettings):
    """One run of a LoRA of all texts."""

    rows: Size = 1  # of each text, so that a step has as many windows as there are texts


class MixedTrainer(AdapterTrainer):
    """A run as `AdapterTrainer`'s, but all texts' windows of a step train one adapter, by the mean of their losses."""

    def _draw(self, weights: Mapping[str, Tensor]) -> None:
        self.updates = {
            key: (torch.nn.Parameter(down), torch.nn.Parameter(up))
            for key, (down, up) in fresh_updates(self.config, self.lora, self.tenants[:1]).items()
        }

    def _backward(self, network: AdaptedNetwork, windows: Tensor) -> Tensor:
        """Of windows [N, rows, T + 1] of all texts; returns each text's loss [N]."""
        texts, kind = len(windows), network.weights["model.norm.weight"].dtype
        used = {
            key: (down.to(kind).expand(texts, -1, -1), up.to(kind).expand(texts, -1, -1))
            for key, (down, up) in self._pairs().items()
        }
        losses = torch.stack(network.losses(used, windows))
        losses.mean().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _loss(self, tenant: int, windows: Tensor, adapted: bool) -> Tensor:
        return super()._loss(0, windows, adapted)

    def _write(self) -> None:
        names = {parts[0]: own.name for own in self.base.modules.values() for parts in own.parts}
        modules = {
            names[key]: Matrices(down[0].detach().clone(), up[0].detach().clone())
            for key, (down, up) in self.updates.items()
        }
        write_adapter(self.folder / ADAPTERS / MIXED, self.name, self.lora.alpha, modules)
