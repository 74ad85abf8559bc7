"""What a tenant of a bank is, and on a text which atoms it picks and shares with others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsc_serve.engine.tenants import overlap
from dsc_serve.files import CheckpointError
from dsc_serve.llm import LLM
from dsc_serve.model import tenant
from dsc_serve.model.folder import file_metadata, stored_tensors
from dsc_serve.sampling_params import ALL_ATOMS, SamplingParams
from dsc_serve.train.evaluation import windows_of
from dsc_serve.train.settings import TrainError

MOST_TOKENS = 8192  # of a text
WINDOW = 256


def is_tenant(folder: Path) -> bool:
    return (folder / tenant.FILE).is_file()


def inspect_tenant(folder: Path) -> dict[str, Any]:
    """What can be known without the base. Raises CheckpointError."""
    path = folder / tenant.FILE
    said, stored = file_metadata(path), stored_tensors([path])
    if stored.keys() != {tenant.BIAS, tenant.GAMMA} or any(len(own.shape) != 2 for own in stored.values()):
        raise CheckpointError(
            f"{path}: holds {', '.join(sorted(stored)) or 'nothing'}; expected b and gamma, by layers"
        )
    bias, gamma = (stored[name].read().float() for name in (tenant.BIAS, tenant.GAMMA))
    return {
        "kind": said.get("kind"),
        "name": folder.name,
        "bank": said.get(tenant.BANK, ""),
        "layers": len(bias),
        "atoms": bias.shape[1],
        "bytes": bias.nbytes + gamma.nbytes,
        "certificate": gamma.abs().amax(1).tolist(),  # no token's dynamic part can have a larger operator norm
        "largest_bias": bias.abs().amax(1).tolist(),
    }


def picked_on(base: str, folders: Sequence[Path], text: str) -> list[dict[str, Any]]:
    """Of each of the tenants in these folders, which have one parent: what it picks on a text, and shares with others.

    Raises TrainError, BrokenAdapterError.
    """
    parents = {folder.resolve().parent for folder in folders}
    if len(parents) > 1:
        raise TrainError("the tenants are in different folders; compare those of one")
    with LLM(base, adapters=str(parents.pop())) as llm:
        if llm.tokenizer is None:
            raise TrainError("the model has no tokenizer; a text cannot become its tokens")
        ids = llm.tokenizer.encode(text, add_special_tokens=False)[:MOST_TOKENS]
        if len(ids) < 2:
            raise TrainError(f"the text has {len(ids)} tokens; at least 2 are needed")
        windows = windows_of(ids, min(WINDOW, llm.engine.capacity.max_tokens) - 1)
        atoms = llm.engine.capacity.pickable
        found = [(folder.name, *picks(llm, windows, folder.name, atoms)) for folder in folders]
    told = []
    for name, seen, signals in found:
        own = inspect_tenant(next(folder for folder in folders if folder.name == name))
        bound = np.tanh(signals.max(0)) * np.array(own["certificate"])
        told.append(
            {
                **own,
                "tokens": len(ids),
                "signal": float(signals.mean()),
                "bound": bound.tolist(),  # tanh(S) max |γ| of the largest signal on this text
                "distinct": seen.sum(1).tolist(),
                "overlap": {other: overlap(seen, theirs) for other, theirs, _ in found if other != name},
            }
        )
    return told


def picks(
    llm: LLM, windows: Sequence[list[int]], name: str, atoms: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which atoms a tenant picks at least once [layers, M], and its signals [tokens, layers]."""
    outputs = llm.generate(windows, SamplingParams(max_tokens=0, routing=ALL_ATOMS), adapter=name)
    arrays = [output.routing.arrays for output in outputs if output.routing is not None]
    layers = arrays[0][0].shape[1]
    seen = np.zeros((layers, atoms), dtype=np.bool_)
    for picked, _, _ in arrays:
        for layer in range(layers):
            seen[layer, picked[:, layer].ravel()] = True
    return seen, np.concatenate([signal for _, _, signal in arrays])


def report(told: dict[str, Any]) -> Iterator[str]:
    """Lines about a tenant."""
    certificate = torch.tensor(told["certificate"])
    yield f"form      {told['kind']}, a tenant of the bank {told['bank'] or 'of no name'}"
    yield f"layers    {told['layers']} with {told['atoms']} atoms each"
    yield f"bytes     {told['bytes']:,} in memory"
    yield (
        f"bound     the dynamic part's operator norm is at most {float(certificate.max()):.4g} "
        f"(median of layers {float(certificate.median()):.4g})"
    )
    if "distinct" in told:
        distinct, bound = told["distinct"], max(told["bound"])
        yield f"picks     {min(distinct)} to {max(distinct)} different atoms a layer on {told['tokens']} tokens"
        yield f"          mean signal {told['signal']:.3f}; at most {bound:.4g} of operator norm there"
        for other, part in told["overlap"].items():
            yield f"shares    {part:.1%} of the atoms of either with {other}"
