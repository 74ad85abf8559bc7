"""Second moments of what a base's modules take in on a text: by these a basis is whitened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.peft.modules import Base
from dsc_serve.train.adapt.network import AdaptedNetwork, Updates
from dsc_serve.train.adapt.trainer import check_base, tokenizer_of
from dsc_serve.train.corpus import prepare
from dsc_serve.train.settings import DataSettings, TrainError

LENGTH = 256  # tokens of a window
WINDOWS = 64  # at most
INPUTS_OF = {"k": "q", "v": "q", "up": "gate"}  # modules that take what another takes


class WatchedNetwork(AdaptedNetwork):
    """Adds up x xᵀ of what its modules take in, by layer and the first of those that take it."""

    seen: dict[tuple[int, str], Tensor]

    def _linear(self, updates: Updates, layer: int, modules: tuple[str, ...], tenants: int, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        moment = (rows.T @ rows).double()
        self.seen[layer, modules[0]] = self.seen.get((layer, modules[0]), 0.0) + moment
        return super()._linear(updates, layer, modules, tenants, x)


def second_moments(base: Path, text: Path) -> Mapping[str, Tensor]:
    """E[x xᵀ], float64 [in, in], by the modules' names in the base. Raises TrainError and CheckpointError."""
    source = open_source(base)
    length = min(LENGTH, source.config.max_position_embeddings)
    check_base(source, length)
    weights = {name: tensor.float() for name, tensor in source.weights().items()}
    network = WatchedNetwork(source.config, weights, 1.0, torch.float32, torch.device("cpu"))
    network.seen = {}
    with TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(source, Path(folder) / "tokenizer")
        data = DataSettings(held_out=0.05, tokenizer=str(tokenizer))
        corpus = prepare([text], data, source.config.vocab_size, Path(folder) / "data")
        ids = corpus.train[: WINDOWS * (length + 1)].astype("int64")
        count = len(ids) // (length + 1)
        if not count:
            raise TrainError(f"{text}: {len(ids)} tokens are not enough; at least {length + 1} are needed")
        windows = torch.from_numpy(ids[: count * (length + 1)]).view(count, length + 1)
        with torch.no_grad():
            for window in windows:
                network.losses({}, window[None, None])
    found = {}
    for name, module in Base(source.config, source.origin).modules.items():
        (layer, own), _, _ = module.parts[0]
        like = own if (layer, own) in network.seen else INPUTS_OF[own]
        found[name] = network.seen[layer, like] / (count * length)
    return found
