"""Training cores on a basis that all tenants share, which stays as it is: LoRA-XS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsc_kernels.weights import Pair
from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.cores.files import BASIS, read_basis, write_basis, write_cores
from dsc_serve.model.cores.singular import singular_pair
from dsc_serve.train.adapt.network import NAMES, Updates
from dsc_serve.train.adapt.tenants import Key, clip
from dsc_serve.train.adapt.trainer import ADAPTERS, AdapterTrainer
from dsc_serve.train.settings import TrainError

KIND = "lora-xs"


class CoreTrainer(AdapterTrainer):
    """Of each module of each tenant a core [rank, rank] is trained, from 0; the basis lies in the run's folder."""

    cores: dict[Key, torch.nn.Parameter]  # [N, rank, rank]

    def _draw(self, weights: Mapping[str, Tensor]) -> None:
        rank, shapes = self.lora.rank, module_shapes(self.config)
        keys = [key for key in shapes if key[1] in self.lora.modules]
        if not keys:
            raise TrainError(f"modules is {list(self.lora.modules)}, and the base has none of them")
        small = min(keys, key=lambda key: min(shapes[key]))
        if rank > min(shapes[small]):
            what = f"{small[1]} of layer {small[0]} is {list(shapes[small])}"
            raise TrainError(f"rank is {rank}, and {what}, which has no more singular vectors than its shorter side")
        self._names = {parts[0]: own.name for own in self.base.modules.values() for parts in own.parts}
        self.pairs = self._basis(keys, weights)
        self.cores = {key: torch.nn.Parameter(torch.zeros(len(self.tenants), rank, rank)) for key in keys}

    def _basis(self, keys: Sequence[Key], weights: Mapping[str, Tensor]) -> dict[Key, Pair]:
        """The one in the run's folder, or a new one, which is put there."""
        found = [file for file in self.folder.iterdir() if BASIS.fullmatch(file.name)]
        if found:
            stored = read_basis(found[0]).read()
            return {key: stored[self._names[key]] for key in keys}
        rank = self.lora.rank
        pairs = {key: singular_pair(weights[f"model.layers.{key[0]}.{NAMES[key[1]]}.weight"], rank) for key in keys}
        write_basis(self.folder, {self._names[key]: pair for key, pair in pairs.items()}, KIND, self.name)
        return pairs

    def _pairs(self) -> Updates:
        """What the cores make of the basis: down [N, rank, in] and up [N, out, rank]."""
        count = len(self.tenants)
        return {key: (pair.down.expand(count, -1, -1), pair.up @ self.cores[key]) for key, pair in self.pairs.items()}

    def _groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.cores.values()), "factor": 1.0}]

    def _clip(self) -> Tensor:
        return clip({key: (core,) for key, core in self.cores.items()}, self.settings.clip)

    def _numbers(self) -> dict[str, Sequence[Tensor]]:
        return {f"{layer}.{module}": (core,) for (layer, module), core in self.cores.items()}

    def _write(self) -> None:
        scale, folder = self.lora.alpha / self.lora.rank, self.folder / ADAPTERS
        folder.mkdir(exist_ok=True)
        digest = write_basis(folder, {self._names[key]: pair for key, pair in self.pairs.items()}, KIND, self.name)
        for i, tenant in enumerate(self.tenants):
            cores = {self._names[key]: scale * core[i].detach() for key, core in self.cores.items()}
            write_cores(folder / tenant.name, (digest, KIND, self.name), cores)
