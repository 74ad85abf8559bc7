"""A small model with a bank, adapters of every kind for it, and of each choice of them the model that it stands for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsc_kernels.weights import Core, LowRank
from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.model.adapter import Adapter, composed
from dsc_serve.model.adapter_kinds import read_adapter
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.config import DscConfig
from dsc_serve.model.cores.files import write_basis, write_cores
from dsc_serve.model.cores.share import project
from dsc_serve.model.cores.singular import singular_pair
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.graft import graft
from dsc_serve.model.tenant import write_tenant
from support.made_adapters import merged
from support.shared_tenants import DIRECTIONS, LLAMA, write_loras, write_shared
from support.small_models import small_config, wide_tensors
from support.tenants import as_tenant, random_tenant
from support.whole_steps import decoder, step

VOCABULARY = 61
CONTEXT = 48
CLOSE = 2e-3  # of the largest logit: what float32 may differ by from float64
NAMES = ("lora", "twin", "few", "core-a", "core-b", "partly", "singular", "bank-a", "bank-b")
CHOICES: dict[str, AdapterChoice | None] = {
    "base": None,
    **{name: AdapterChoice.of(name) for name in NAMES},
    "lora and core": AdapterChoice((("lora", 0.5), ("core-a", -1.5))),
    "tenant and cores of two bases": AdapterChoice((("bank-a", 1.5), ("core-b", 0.5), ("singular", -0.5))),
    "half a tenant": AdapterChoice((("bank-b", 0.5),)),
    "product": AdapterChoice((("lora", 0.6), ("twin", 0.4)), "product of sums"),
}


class MixedKinds:
    """In a folder `model`, with a bank beside two of three layers' MLPs, and `adapters`.

    lora, twin: of all modules; few: of the first layer's alone; core-a, core-b: on a basis that was found in LoRAs;
    partly: put onto that basis, where it has half of the modules and the others keep their matrices; singular: on the
    singular vectors of the weights; bank-a, bank-b: tenants of the bank.
    """

    def __init__(self, folder: Path) -> None:
        size = {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
        base = small_config("dense", **size, tie_word_embeddings=False, **LLAMA)
        save_checkpoint(base, wide_tensors(base), folder / "base")
        self.model, self.adapters = folder / "model", folder / "adapters"
        self.config = graft(folder / "base", self.model, 50, 3, "1-2")
        self.tensors = dict(open_source(self.model).weights())
        loras = folder / "loras"
        write_loras(self.model, loras, ["lora", "twin", "core-a", "core-b"])
        write_loras(self.model, loras, ["few"], rank=2, only="layers.0.")
        write_loras(self.model, loras, ["partly"], apart="self_attn.")
        for name in ("lora", "twin", "few"):
            shutil.copytree(loras / name, self.adapters / name)
        basis = write_shared(loras, self.adapters, ["core-a", "core-b"])
        found = project([loras / "partly"], self.adapters, basis, 0.3)
        self.apart = set(found.adapters["partly"].own)
        self._write_singular()
        ffn = self.config.ffn
        assert isinstance(ffn, DscConfig)
        for i, name in enumerate(("bank-a", "bank-b")):
            tenant = random_tenant(self.config, i, bias=2.0, gamma=8.0)
            write_tenant(self.adapters / name, tenant.bias, tenant.gamma, ffn.bank)
        self.decoder = decoder(self.config, self.tensors)
        self.digests = {self.read(name).digest: name for name in NAMES}
        self.own_model = cache(self._own_model)
        self.answer = cache(self._answer)

    def _write_singular(self) -> None:
        matrices = {name.removesuffix(".weight"): own for name, own in self.tensors.items() if "_proj." in name}
        pairs = {name: singular_pair(own, DIRECTIONS - 2) for name, own in matrices.items()}
        digest = write_basis(self.adapters, pairs, "lora-xs", "small")
        g = torch.Generator().manual_seed(5)
        cores = {name: 0.2 * torch.randn(DIRECTIONS - 2, DIRECTIONS - 2, generator=g) for name in pairs}
        write_cores(self.adapters / "singular", (digest, "lora-xs", "small"), cores)

    def read(self, name: str) -> Adapter:
        return read_adapter(self.adapters / name, self.config)

    def spelt(self, name: str) -> Adapter:
        """With the matrices that its cores stand on."""
        own = self.read(name)
        pairs = {} if own.basis is None else own.basis.pairs()
        modules = {
            place: LowRank(*pairs[place], one.scale, core=one.matrix) if isinstance(one, Core) else one
            for place, one in own.modules.items()
        }
        return replace(own, modules=modules)

    def _own_model(self, choice: AdapterChoice | None) -> Decoder:
        """That needs no adapter: matrices are added to its weights, a tenant's bias and scale to its bank; float64."""
        parts = [] if choice is None else [(self.spelt(name), weight) for name, weight in choice.parts]
        if choice is not None and choice.form != "sum":
            parts = [(composed(parts, choice.form), 1.0)]
        config, tensors = self.config, merged(self.config, self.tensors, parts)
        for adapter, weight in parts:
            if adapter.tenant is not None:
                config, tensors = as_tenant(config, tensors, adapter.tenant, weight)
        return decoder(config, {name: own.double() for name, own in tensors.items()}, torch.float64)

    def logits(self, choice: AdapterChoice | None, ids: list[int]) -> Tensor:
        """[T, vocabulary], of the model by itself."""
        (found,) = step(self.own_model(choice), [ids], [None])
        return found

    def _answer(self, choice: AdapterChoice | None, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The greedy continuation, by the model by itself."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(choice, ids)[-1].argmax()))
        return tuple(ids[len(prompt) :])

    def says(self, choice: AdapterChoice | None, prompt: list[int], tokens: list[int]) -> bool:
        """Whether each of these tokens is what the choice's own model says after those before it, to rounding."""
        if not tokens:
            return True
        logits = self.logits(choice, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        said = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return bool((logits.amax(1) - said <= CLOSE * logits.abs().amax(1)).all())
