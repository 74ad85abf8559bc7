"""Adapters in memory: immutable low-rank updates of a model's projections."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsc_kernels.weights import MODULES as MODULES
from dsc_kernels.weights import Core, Pair, Place, Update
from dsc_kernels.weights import LowRank as LowRank
from dsc_serve.adapter_choice import BrokenAdapterError, Form
from dsc_serve.adapter_choice import UnknownAdapterError as UnknownAdapterError
from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig

ModuleName = Place  # a layer and one of MODULES


class SharedBasis(Protocol):
    """What adapters share, by modules; read when it is asked for, since it may be in memory already."""

    @property
    def digest(self) -> str:
        """sha256, in hex, of its content."""

    @property
    def key(self) -> Hashable:
        """What changes when its file does."""

    def pairs(self) -> Mapping[ModuleName, Pair]:
        """Read it. Raises CheckpointError where its content is another than the digest says."""


@dataclass(frozen=True, eq=False)
class BankTenant:
    """What a tenant of a model's bank has of its own, by the layers that have one, in order; float32."""

    bias: Tensor  # [layers, M], added to the router's
    gamma: Tensor  # [layers, d]

    @property
    def nbytes(self) -> int:
        return self.bias.nbytes + self.gamma.nbytes


@dataclass(frozen=True, eq=False)
class Adapter:
    """Updates of some modules of a model, or a tenant of its bank.

    Requests hold it; nothing changes it, so nobody needs to know who does.
    """

    name: str
    digest: str  # sha256, in hex, of its content, its basis's among it
    kind: str  # "lora", "dsc", "composition", or of cores what their basis is: "shared" or "lora-xs"
    modules: Mapping[ModuleName, Update]
    nbytes: int  # of its tensors, without the basis's
    rank: int  # the largest of its modules
    basis: SharedBasis | None = None  # on which its cores stand
    tenant: BankTenant | None = None

    @property
    def changed(self) -> int:
        """How many modules it changes; of a bank each layer's is one."""
        return len(self.modules) + (0 if self.tenant is None else len(self.tenant.bias))


class AdapterStore(Protocol):
    """Where adapters come from."""

    def names(self) -> Sequence[str]:
        """All that there are, broken ones among them."""

    def get(self, name: str) -> Adapter:
        """Raises UnknownAdapterError or BrokenAdapterError."""


def module_shapes(config: ModelConfig) -> dict[ModuleName, tuple[int, int]]:
    """(out, in) of every module that can be adapted: attention's projections, and the MLP that every token takes.

    That is a dense layer's, the static part of DSC's and of a mixture of LoRAs, and the expert that all tokens share;
    routers, atoms, picked experts and picked LoRAs are none, nor are projections of latent attention, which products of
    several matrices have become.
    """
    d, shapes = config.hidden_size, dict[ModuleName, tuple[int, int]]()
    for i, kind in enumerate(config.layers):
        if kind.latent_size is None:
            shapes[i, "q"] = kind.query_size, d
            shapes[i, "k"] = shapes[i, "v"] = kind.kv_size, d
            shapes[i, "o"] = d, kind.query_size
        hidden = shared_size(kind)
        if hidden and kind.mlp_gated:
            shapes[i, "gate"] = hidden, d
        if hidden:
            shapes[i, "up"], shapes[i, "down"] = (hidden, d), (d, hidden)
    return shapes


def shared_size(config: ModelConfig) -> int:
    """Width of the MLP that every token takes in layers of this kind; 0: there is none."""
    ffn = config.ffn
    if isinstance(ffn, DenseConfig):
        return ffn.size
    if isinstance(ffn, DscConfig | MoloraConfig):
        return ffn.static_size
    assert isinstance(ffn, MoeConfig)
    return 0 if ffn.shared_expert is None else ffn.shared_expert.size


def check_fits(adapter: Adapter, config: ModelConfig) -> None:
    """Raise BrokenAdapterError naming the first module that is none of the model's, or has another shape."""
    shapes = module_shapes(config)
    for (layer, module), part in adapter.modules.items():
        shape = shapes.get((layer, module))
        if shape is None:
            raise BrokenAdapterError(adapter.name, f"the model has no {module} in layer {layer} that can be adapted")
        if isinstance(part, Core):
            continue  # what its basis fits
        out, into = shape
        if part.down.shape != (part.rank, into) or part.up.shape != (out, part.rank):
            given = f"{list(part.down.shape)} and {list(part.up.shape)}"
            expected = f"[r, {into}] and [{out}, r]"
            raise BrokenAdapterError(adapter.name, f"{module} of layer {layer} is {given}; expected {expected}")


def composed(parts: Sequence[tuple[Adapter, float]], form: Form = "sum") -> Adapter:
    """Several adapters with weights as one. Raises BrokenAdapterError where a product of sums has no meaning.

    sum: ranks add up, and nothing is approximated. product of sums: a module that some lack counts as zeros there.
    """
    name = "+".join(adapter.name for adapter, _ in parts)
    names = dict.fromkeys(key for adapter, _ in parts for key in adapter.modules)
    modules = {}
    for key in names:
        weighted = [(low_rank(adapter, key), weight) for adapter, weight in parts if key in adapter.modules]
        modules[key] = summed(weighted) if form == "sum" else product_of_sums(weighted, key, name)
    digest = composition_digest([(adapter.digest, weight) for adapter, weight in parts], form)
    nbytes = sum(part.nbytes for part in modules.values())
    return Adapter(name, digest, "composition", modules, nbytes, max((p.rank for p in modules.values()), default=0))


def low_rank(adapter: Adapter, key: ModuleName) -> LowRank:
    """An update that is none on a shared basis. Raises BrokenAdapterError."""
    own = adapter.modules[key]
    if isinstance(own, Core) or own.core is not None:
        raise BrokenAdapterError(adapter.name, "its matrices are a basis's, which others have too; compose it by a sum")
    return own


def composition_digest(parts: Sequence[tuple[str, float]], form: Form) -> str:
    """The digest of adapters of these digests with these weights."""
    content = hashlib.sha256(form.encode())
    for digest, weight in parts:
        content.update(struct.pack("<q", len(digest)) + digest.encode() + struct.pack("<d", weight))
    return content.hexdigest()


def summed(parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Σ wᵢ sᵢ Bᵢ Aᵢ: all Aᵢ below each other, all Bᵢ beside each other, and wᵢ sᵢ between them."""
    dtype = wider(parts)
    down = torch.cat([part.down.to(dtype) for part, _ in parts])
    up = torch.cat([part.up.to(dtype) for part, _ in parts], dim=1).contiguous()
    return LowRank(down, up, 1.0, torch.cat([part.coefficients * weight for part, weight in parts]))


def wider(parts: Sequence[tuple[LowRank, float]]) -> torch.dtype:
    """A dtype that loses nothing of any part."""
    return torch.float32 if len({part.down.dtype for part, _ in parts}) > 1 else parts[0][0].down.dtype


def product_of_sums(parts: Sequence[tuple[LowRank, float]], key: ModuleName, name: str) -> LowRank:
    """(Σ wᵢ √sᵢ Bᵢ)(Σ wᵢ √sᵢ Aᵢ)."""
    layer, module = key
    ranks = {part.rank for part, _ in parts}
    if len(ranks) > 1:
        raise BrokenAdapterError(
            name, f"{module} of layer {layer} has ranks {sorted(ranks)}; a product of sums needs one"
        )
    if any(bool((part.coefficients < 0).any()) for part, _ in parts):
        raise BrokenAdapterError(name, f"{module} of layer {layer} has a scale below 0; a product of sums needs roots")
    down, up = torch.zeros(()).double(), torch.zeros(()).double()
    for part, weight in parts:
        roots = part.coefficients.double().sqrt() * weight
        down, up = down + part.down.double() * roots[:, None], up + part.up.double() * roots
    dtype = wider(parts)
    return LowRank(down.to(dtype), up.to(dtype))
