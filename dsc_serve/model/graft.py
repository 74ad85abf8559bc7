"""An empty DSC branch beside the MLPs of a pretrained model: the same model, with a bank that tenants can share."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dsc_serve.files import CheckpointError
from dsc_serve.model.architectures.family import by_layer
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, checked_config
from dsc_serve.model.ffn import KINDS
from dsc_serve.model.folder import refuse_taken
from dsc_serve.model.initial import STD
from dsc_serve.model.origin import write_origin
from dsc_serve.model.quantised_folder import Saved
from dsc_serve.model.source import ModelSource

MATRICES = ("gate_proj", "up_proj", "down_proj")
WIDTH = 16  # of a bank's name, in hex digits


def graft(
    base: Path,
    out: Path,
    atoms: int,
    picks: int,
    layers: str = "",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelConfig:
    """Write `base` with an empty branch of so many atoms, of which each token picks `picks`, beside its MLPs.

    layers: which, as in "20-29" or "0,4,8-11"; "": all. Weights stay as they are stored, bit for bit; the bank is drawn
    by the seed, and γ is 0. dtype: of weights that a GGUF file holds in blocks, which are dequantised.
    Raises CheckpointError, TokenizerError.
    """
    refuse_taken(out)
    source = open_source(base)
    source.check()
    chosen = layers_of(layers, source.config.num_hidden_layers)
    config = grafted_config(source, chosen, atoms, picks)
    drawn = empty_branches(config, chosen, seed)
    ffn = config.ffn.model_copy(update={"bank": name_of(drawn)})
    config = config.model_copy(update={"ffn": ffn})
    texts, weights, tensors = source.texts(), source.weights(), dict[str, Saved]()
    for name, stored in source.tensors.items():
        own: Saved | None = None
        if stored.quantised is not None:
            own = stored.quantised() if not source.exact_in_float32 else weights[name].to(dtype)
        tensors[renamed(name, chosen)] = weights[name] if own is None else own
    tensors |= {name: in_dtype(tensor, source.dtype) for name, tensor in drawn.items()}
    save_checkpoint(config, tensors, out, source.path, source.dtype)
    if source.origin is not None:
        write_origin(source.origin, out)
    for name, text in texts.items():
        (out / name).write_text(text, "utf8")
    return config


def with_bank(source: ModelSource, bank: Mapping[str, Tensor], name: str, out: Path) -> None:
    """Write a model with other numbers in its branches, under the name that their tenants call them by.

    What is in `out` already is replaced. Raises CheckpointError.
    """
    part = out.with_name(f"{out.name}.part")
    for old in (part, out):
        shutil.rmtree(old, ignore_errors=True)
    weights, tensors = source.weights(), dict[str, Saved]()
    for key, stored in source.tensors.items():
        own: Saved | None = None if key not in bank else in_dtype(bank[key], source.dtype)
        if own is None and stored.quantised is not None and not source.exact_in_float32:
            own = stored.quantised()
        tensors[key] = weights[key] if own is None else own
    ffn = source.config.ffn.model_copy(update={"bank": name})
    save_checkpoint(source.config.model_copy(update={"ffn": ffn}), tensors, part, source.path, source.dtype)
    if source.origin is not None:
        write_origin(source.origin, part)
    for file, text in source.texts().items():
        (part / file).write_text(text, "utf8")
    part.rename(out)


def layers_of(text: str, count: int) -> list[int]:
    """The layers that a list of numbers and ranges names, in order; "": all. Raises CheckpointError."""
    if not text.strip():
        return list(range(count))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        words = [first, last] if dash else [first]
        if not all(word.isdecimal() and len(word) < 6 for word in words):
            raise CheckpointError(f"layers is {text!r}; expected numbers and ranges such as 0,4,8-11")
        numbers = [int(word) for word in words]
        if numbers[-1] >= count or numbers[0] > numbers[-1]:
            raise CheckpointError(f"layers is {text!r}, with {part.strip()}; the model's are 0 to {count - 1}")
        found |= set(range(numbers[0], numbers[-1] + 1))
    return sorted(found)


def grafted_config(source: ModelSource, chosen: Iterable[int], atoms: int, picks: int) -> ModelConfig:
    """The configuration with a branch beside these layers' MLPs. Raises CheckpointError where there can be none."""
    config, own = source.config, set(chosen)
    ffn = check_base(source)
    branch = {"kind": "dsc", "num_atoms": atoms, "atoms_per_token": picks, "static_size": ffn.size}
    content = config.model_dump(exclude_none=True) | {"ffn": branch, "quantised": []}
    bare = [i not in own for i in range(config.num_hidden_layers)]
    if any(bare):
        content = by_layer(content, {"ffn": ffn.model_dump()}, bare)
    return checked_config(content, str(source.path))


def check_base(source: ModelSource) -> DenseConfig:
    """The MLP that all layers have. Raises CheckpointError, naming the family, where it is not gated or has biases."""
    config, named = source.config, ""
    if source.origin is not None:
        named = f" of the family {', '.join(source.origin.content.get('architectures') or ['unknown'])}"
    kinds = [kind.ffn for kind in config.kinds]
    wrong = next((kind.kind for kind in kinds if not isinstance(kind, DenseConfig)), None)
    why = ""
    if wrong is not None:
        why = f"ffn.kind is {wrong!r}"
    elif not config.mlp_gated:
        why = "its MLP has no gate"
    elif any(isinstance(kind, DenseConfig) and kind.bias for kind in kinds):
        why = "its MLP has biases"
    elif any(kind != kinds[0] for kind in kinds):
        why = "its layers' MLPs differ"
    if why:
        raise CheckpointError(
            f"{source.path}: a model{named}, and {why}; a branch needs dense, gated MLPs without biases"
        )
    assert isinstance(kinds[0], DenseConfig)
    return kinds[0]


def renamed(name: str, chosen: Iterable[int]) -> str:
    """Where a tensor of the base is in the grafted model: its MLPs are the static part of layers."""
    model, _, rest = name.partition("model.layers.")
    number, _, own = rest.partition(".")
    below = own.removeprefix("mlp.")
    if model or own == below or int(number) not in chosen:
        return name
    return f"model.layers.{number}.mlp.static.{below}"


def empty_branches(config: ModelConfig, chosen: Iterable[int], seed: int) -> dict[str, Tensor]:
    """The tensors of the branches in float32: atoms orthogonal and routers narrow as the paper draws them, γ 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for i in chosen:
        kind = config.layers[i]
        for name, shape in KINDS["dsc"].shapes(kind).items():
            if name.startswith("static."):
                continue
            tensor = torch.zeros(shape)
            if name.startswith("atoms_"):
                nn.init.orthogonal_(tensor, generator=generator)
                tensor.mul_(STD)
            elif name == "router.weight":
                tensor.normal_(0.0, STD, generator=generator)
            elif name == "router_norm.weight":
                tensor.fill_(1.0)
            drawn[f"model.layers.{i}.mlp.{name}"] = tensor
    return drawn


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices of a branch in the model's dtype; vectors stay in float32."""
    return tensor.to(dtype) if tensor.dim() > 1 else tensor


def name_of(drawn: Mapping[str, Tensor]) -> str:
    """What tenants name a bank by: a digest of its numbers as they were made, whatever they are stored in later."""
    content = hashlib.sha256()
    for name, tensor in sorted(drawn.items()):
        content.update(name.encode())
        content.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:WIDTH]


def branch_bytes(config: ModelConfig, itemsize: int) -> tuple[int, int]:
    """Bytes of all branches together, and of a tenant of them in memory."""
    banks = [kind.ffn for kind in config.layers if isinstance(kind.ffn, DscConfig)]
    rows = sum(3 * own.num_atoms for own in banks)
    tenant = sum(own.num_atoms + config.hidden_size for own in banks)
    return rows * config.hidden_size * itemsize, 4 * tenant
