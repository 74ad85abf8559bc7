"""Random adapters, and what they do to weights."""

from __future__ import annotations

import hashlib
import re
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsc_kernels.backend import Basis, BoundAdapter
from dsc_kernels.weights import Core, LowRank, Pair, Place, Tuning, Update
from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError
from dsc_serve.engine.adapter_folder import LOOK_S, AdapterFolder
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.leases import Wanted
from dsc_serve.model.adapter import Adapter, BankTenant, module_shapes
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.tenant import digest_of

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


PLACE: Place = (0, "q")  # what pretended adapters change
BASIS_BYTES = 50


@dataclass(frozen=True, eq=False)
class BoundBasis:
    """What a decoder that computes nothing makes of a basis."""

    nbytes: int = BASIS_BYTES


@dataclass(frozen=True, eq=False)
class Bound:
    """What a decoder that computes nothing makes of an adapter."""

    nbytes: int
    bases: Sequence[Basis] = ()
    tunings: Mapping[int, Tuning] = field(default_factory=dict)

    def updates(self, layer: int, module: str) -> Sequence[LowRank]:
        core = torch.ones(1, 1) if self.bases else None
        return [LowRank(torch.ones(1, 1), torch.ones(1, 1), core=core)] if (layer, module) == PLACE else []


class PretendedDecoder:
    """Every adapter takes as many bytes. held, bases: what has been made and is not gone."""

    modules: Sequence[object] = [None]

    def __init__(self, nbytes: int = 100) -> None:
        self.nbytes, self.made, self.bases = nbytes, weakref.WeakSet[Bound](), weakref.WeakSet[BoundBasis]()

    def basis(self, pairs: Mapping[Place, Pair]) -> Basis:
        made = BoundBasis()
        self.bases.add(made)
        return made

    def adapter(
        self, updates: Mapping[Place, Update], basis: Basis | None = None, tenant: BankTenant | None = None
    ) -> Bound:
        assert any(isinstance(one, Core) for one in updates.values()) == (basis is not None)
        tunings = {} if tenant is None else {0: Tuning(tenant.bias[0], tenant.gamma[0])}
        return self._make(self.nbytes, () if basis is None else (basis,), tunings)

    def summed(self, parts: Sequence[tuple[BoundAdapter, float]]) -> Bound:
        bases = {id(basis): basis for part, _ in parts for basis in part.bases}
        return self._make(
            0, list(bases.values()), {layer: own for part, _ in parts for layer, own in part.tunings.items()}
        )

    def _make(self, nbytes: int, bases: Sequence[Basis], tunings: Mapping[int, Tuning]) -> Bound:
        made = Bound(nbytes, bases, tunings)
        self.made.add(made)
        return made


@dataclass(frozen=True)
class PretendedBasis:
    """One that adapters of its name stand on."""

    digest: str

    @property
    def key(self) -> str:
        return self.digest

    def pairs(self) -> Mapping[Place, Pair]:
        return {PLACE: Pair(torch.ones(1, 1), torch.ones(1, 1))}


class Reader:
    """Adapters by the text in their folder: `file` holds a seed, or what is wrong. config: None: of no real model.

    Of no real model a letter before the seed tells other kinds: x or y a core on the basis of this name, t a tenant.
    """

    def __init__(self, config: ModelConfig | None = None, ranks: Sequence[int] = (3,)) -> None:
        self.config, self.ranks, self.read = config, ranks, list[str]()

    def __call__(self, folder: Path, config: ModelConfig | None = None, origin: object = None) -> Adapter:
        self.read.append(folder.name)
        text = (folder / "file").read_text()
        told = re.fullmatch("([xyt]?)([0-9]+)", text)
        if told is None or (told[1] and self.config is not None):
            raise BrokenAdapterError(folder.name, f"the file says {text!r}")
        if self.config is not None:
            return random_adapter(folder.name, self.config, self.ranks, int(text))
        return pretended(folder.name, told[1], float(told[2]))


def pretended(name: str, kind: str, number: float) -> Adapter:
    """Of no real model. kind: "", "x", "y" or "t", as `Reader` tells them."""
    if kind == "t":
        tenant = BankTenant(torch.full((1, 1), number), torch.ones(1, 1))
        return Adapter(name, digest_of(tenant), "dsc", {}, tenant.nbytes, 0, tenant=tenant)
    if kind:
        core = Core(torch.full((1, 1), number))
        content = hashlib.sha256(f"{kind} {number}".encode()).hexdigest()
        return Adapter(name, content, "shared", {PLACE: core}, core.nbytes, 1, basis=PretendedBasis(kind))
    return adapter_of(name, {PLACE: LowRank(torch.ones(1, 1), torch.full((1, 1), number))})


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

    def resolved(self, *wanted: Wanted) -> None:
        """Until all of these have a lease or an error."""
        until = time.monotonic() + 20
        while not all(one.resolved for one in wanted):
            self.adapters.resolve(0.05)
            assert time.monotonic() < until, "an adapter was never resolved"

    def get(self, choice: AdapterChoice) -> Wanted:
        wanted = self.adapters.want(choice)
        self.resolved(wanted)
        return wanted

    def loaded(self) -> set[str]:
        return {info.name for info in self.adapters.infos() if info.loaded}
