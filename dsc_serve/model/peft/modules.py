"""The modules of a base model that adapters may change, under the names of its family, and how they get to ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import ModuleName
from dsc_serve.model.architectures import Architecture, Settings, architecture_of
from dsc_serve.model.architectures.family import LLAMA_MODULES, SHARED_EXPERT, Modules
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import tensor_shapes
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft.targets import Named
from dsc_serve.model.source import Stored

# Of models that were made in the serving form: DSC and mixtures of LoRAs have their static part at a name of its own.
OWN_MODULES: Modules = {
    **LLAMA_MODULES,
    **SHARED_EXPERT,
    **{f"model.layers.{{}}.mlp.static.{part}_proj": (f"mlp.static.{part}_proj",) for part in ("gate", "up", "down")},
}
NOT_ADAPTED = {
    r"\.experts\b": "experts are not adapted here, only what every token takes",
    r"(^|\.)(mlp\.gate|router(\.layer)?|shared_expert_gate)$": "routers are not adapted here",
    r"(^|\.)(lm_head|embed_out)$": "the head is not adapted here",
    r"(^|\.)(embed_tokens|wte|wpe|embed_in|word_embeddings)$": "embeddings are not adapted here",
    r"norm|\bln_": "norms are not adapted here",
    r"\b(kv_a_proj_with_mqa|kv_b_proj|q_a_proj|q_b_proj)$": "projections of latent attention are not adapted here",
}


@dataclass(frozen=True)
class BaseModule(Named):
    """A linear module of the base."""

    parts: tuple[tuple[ModuleName, str, int], ...] = ()  # those of the serving form that it becomes, with their rows
    out: int = 0  # [out, into] is its shape
    into: int = 0


class Base:
    """A base model's modules by name. Raises CheckpointError for an origin of no known family."""

    def __init__(self, config: ModelConfig, origin: Origin | None) -> None:
        self._config = config
        self._settings = None if origin is None else Settings(origin.content, origin.path)
        self._family: Architecture | None = None if self._settings is None else architecture_of(self._settings)
        self.modules = {own.name: own for own in linear_modules(config, OWN_MODULES if origin is None else self._named)}

    @property
    def _named(self) -> Modules:
        assert self._family is not None
        return self._family.modules

    @property
    def transposed(self) -> bool:
        """Whether the family stores its matrices the other way round, for which PEFT sets `fan_in_fan_out`."""
        return self._family is not None and self._family.transposed

    def brought(self, module: BaseModule, up: Tensor) -> Iterator[tuple[ModuleName, Tensor]]:
        """What the rows [out, r] of an update become, split, reordered and multiplied as the base's own rows are."""
        found = {f"{module.name}.weight": up}
        if self._family is not None:
            assert self._settings is not None
            given = up.T.contiguous() if self.transposed else up
            stored = {f"{module.name}.weight": Stored(tuple(given.shape), given.dtype, lambda: given)}
            made = self._family.tensors(stored, self._settings, self._config)
            found = {name: own.read() for name, own in made.items()}
        for key, name, rows in module.parts:
            part = found.pop(f"{name if f'{name}.weight' in found else name.replace('.mlp.static.', '.mlp.')}.weight")
            assert part.shape == (rows, up.shape[1]), (module.name, name, part.shape)
            yield key, part.contiguous()
        assert not found, (module.name, sorted(found))

    def refuse(self, name: str) -> CheckpointError:
        """Why a module of this name cannot be adapted."""
        for pattern, why in NOT_ADAPTED.items():
            if re.search(pattern, name):
                return CheckpointError(f"module {name!r}: {why}")
        known = next(iter(self.modules), "none at all")
        return CheckpointError(f"module {name!r} matches nothing in the base model, whose modules are such as {known}")


def linear_modules(config: ModelConfig, named: Mapping[str, tuple[str, ...]]) -> Iterator[BaseModule]:
    shapes = tensor_shapes(config)
    for layer in range(config.num_hidden_layers):
        for template, below in named.items():
            names = [f"model.layers.{layer}.{own}" for own in below]
            if named is not OWN_MODULES:  # a layer that was grafted upon has its MLP at another name
                names = [
                    name if f"{name}.weight" in shapes else name.replace(".mlp.", ".mlp.static.") for name in names
                ]
            found = [shapes.get(f"{name}.weight") for name in names]
            if all(shape is not None for shape in found):
                sizes = [torch.Size(shape or ()) for shape in found]
                parts = tuple(
                    ((layer, own.rpartition(".")[2].removesuffix("_proj")), name, size[0])
                    for own, name, size in zip(below, names, sizes, strict=True)
                )
                out = sum(rows for _, _, rows in parts)
                yield BaseModule(template.format(layer), layer, parts, out, sizes[0][1])
