"""Random adapters, and what they do to weights."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsc_kernels.backend import Adapter as BoundAdapter
from dsc_kernels.backend import Basis
from dsc_kernels.weights import LowRank, Pair, Place, Tuning, Update
from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError
from dsc_serve.engine.adapter_folder import LOOK_S, AdapterFolder
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.leases import Wanted
from dsc_serve.model.adapter import Adapter, BankTenant, module_shapes
from dsc_serve.model.config import ModelConfig

TENSORS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
PLACES = {"dense": "mlp.", "dsc": "mlp.static.", "molora": "mlp.static.", "moe": "mlp.shared_expert."}


def random_updates(
    shapes: Mapping[Place, tuple[int, int]], ranks: Sequence[int], seed: int, size: float = 1.0
) -> dict[Place, LowRank]:
    """An update of every module, ranks in turn; scales differ. size: of ΔW beside a weight of unit rows."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for i, (place, (out, into)) in enumerate(shapes.items()):
        rank = ranks[(i + seed) % len(ranks)]
        if not rank:
            continue
        down = torch.randn(rank, into, generator=generator) / into**0.5
        up = torch.randn(out, rank, generator=generator) * size / rank**0.5
        updates[place] = LowRank(down, up, 0.5 + 0.25 * (i % 3))
    return updates


def adapter_of(name: str, updates: Mapping[Place, LowRank]) -> Adapter:
    content = hashlib.sha256()
    for place, one in sorted(updates.items()):
        content.update(repr((place, one.scale)).encode() + one.down.numpy().tobytes() + one.up.numpy().tobytes())
    rank = max((one.rank for one in updates.values()), default=0)
    return Adapter(name, content.hexdigest(), "lora", updates, sum(one.nbytes for one in updates.values()), rank)


def random_adapter(name: str, config: ModelConfig, ranks: Sequence[int] = (3,), seed: int = 0) -> Adapter:
    return adapter_of(name, random_updates(module_shapes(config), ranks, seed))


def delta(updates: Sequence[tuple[LowRank, float]]) -> Tensor:
    """Σ wᵢ sᵢ Bᵢ Aᵢ in float64."""
    return torch.stack([dense(one) * weight for one, weight in updates]).sum(0)


def dense(one: LowRank) -> Tensor:
    """s B A, or s B R A, in float64."""
    down = one.down.double() if one.core is None else one.core.double() @ one.down.double()
    return (one.up.double() * one.coefficients.double()) @ down


def merged(
    config: ModelConfig, tensors: Mapping[str, Tensor], adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, Tensor]:
    """A checkpoint's tensors with adapters added into them: what a model without adapters would have to be."""
    found = dict(tensors)
    for place in {place for adapter, _ in adapters for place in adapter.modules}:
        layer, module = place
        own = TENSORS.get(module) or f"{PLACES[config.layers[layer].ffn.kind]}{module}_proj"
        name = f"model.layers.{layer}.{own}.weight"
        parts = [(adapter.modules[place], weight) for adapter, weight in adapters if place in adapter.modules]
        found[name] = (found[name].double() + delta(parts)).to(found[name].dtype)
    return found


@dataclass(frozen=True, eq=False)
class Bound:
    """What a decoder that computes nothing makes of an adapter."""

    nbytes: int
    bases: Sequence[Basis] = ()
    tunings: Mapping[int, Tuning] = field(default_factory=dict)

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        return [LowRank(torch.ones(1, 1), torch.ones(1, 1))] if (layer, module) == (0, "q") else []


class PretendedDecoder:
    """Every adapter takes as many bytes. held: what has been made and is not gone."""

    modules: Sequence[object] = [None]

    def __init__(self, nbytes: int = 100) -> None:
        self.nbytes, self.made = nbytes, weakref.WeakSet[Bound]()

    def basis(self, pairs: Mapping[Place, Pair]) -> Basis:
        raise AssertionError("no adapter here has any")

    def adapter(
        self, updates: Mapping[Place, Update], basis: Basis | None = None, tenant: BankTenant | None = None
    ) -> Bound:
        return self._make(self.nbytes)

    def summed(self, parts: Sequence[tuple[BoundAdapter, float]]) -> Bound:
        return self._make(0)

    def _make(self, nbytes: int) -> Bound:
        made = Bound(nbytes)
        self.made.add(made)
        return made


class Reader:
    """Adapters by the text in their folder: `file` holds a seed, or what is wrong. config: None: of no real model."""

    def __init__(self, config: ModelConfig | None = None, ranks: Sequence[int] = (3,)) -> None:
        self.config, self.ranks, self.read = config, ranks, list[str]()

    def __call__(self, folder: Path, config: ModelConfig | None = None, origin: object = None) -> Adapter:
        self.read.append(folder.name)
        text = (folder / "file").read_text()
        if not text.isdigit():
            raise BrokenAdapterError(folder.name, f"the file says {text!r}")
        if self.config is None:
            return adapter_of(folder.name, {(0, "q"): LowRank(torch.ones(1, 1), torch.full((1, 1), float(text)))})
        return random_adapter(folder.name, self.config, self.ranks, int(text))


def put(folder: Path, name: str, text: str) -> None:
    """Write an adapter for `Reader`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "file").write_text(text)


class Clock:
    """Goes only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class MadeAdapters:
    """Adapters over a folder of a test, of 100 bytes each; budget: how many fit."""

    def __init__(self, folder: Path, budget: int = 2) -> None:
        self.path, self.clock, self.reader, self.decoder = folder, Clock(), Reader(), PretendedDecoder()
        self.adapters = Adapters(
            AdapterFolder(folder, self.reader, self.clock), self.decoder, 100 * budget, "base", self.clock
        )

    def put(self, **texts: str) -> None:
        for name, text in texts.items():
            put(self.path, name, text)
        self.clock.now += LOOK_S

    def settled(self, *wanted: Wanted) -> None:
        """Until all of these have a lease or an error."""
        until = time.monotonic() + 20
        while not all(one.settled for one in wanted):
            self.adapters.settle(0.05)
            assert time.monotonic() < until, "an adapter was never settled"

    def get(self, choice: AdapterChoice) -> Wanted:
        wanted = self.adapters.want(choice)
        self.settled(wanted)
        return wanted

    def loaded(self) -> set[str]:
        return {info.name for info in self.adapters.infos() if info.loaded}
