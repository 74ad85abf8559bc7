"""Dropping the atoms that a calibration text never picks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.llm import LLM
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.config import DscConfig, ModelConfig
from dsc_serve.text.tokenizer import FILES, Tokenizer
from dsc_serve.train.evaluation import Evaluation, evaluate
from dsc_serve.train.ffn import Pass
from dsc_serve.train.network import Network
from dsc_serve.train.settings import LossSettings, TrainError
from dsc_serve.train.usage import TrainingUsage

PER_ATOM = ("router.weight", "router.bias", "atoms_u", "atoms_v")


@dataclass(frozen=True)
class Pruned:
    """What was dropped, and what it cost."""

    live: list[int]  # per layer, the atoms that the calibration text picks
    before: int  # the model's atoms per layer
    after: int  # of the pruned model
    losses: dict[str, tuple[Evaluation, Evaluation]]  # for each measured text, the evaluations before and after


def usage_on(config: ModelConfig, tensors: dict[str, Tensor], ids: list[int]) -> TrainingUsage:
    """How often each atom is picked over all token ids, in windows of the whole context, computed in float32."""
    network = Network(config, torch.float32, torch.device("cpu"))
    usage = TrainingUsage()
    length, targets = config.max_position_embeddings, [*ids, ids[-1]]  # a window's last token is only a target
    for start in range(0, len(ids), length):
        window = torch.tensor([targets[start : start + length + 1]])
        with torch.no_grad():
            usage.add(network(tensors, window, Pass(LossSettings(), training=False)).layers)
    return usage


def prune(model: Path, calibration: str, texts: dict[str, str], out: Path) -> Pruned:
    """Write to `out` the model without the atoms that the calibration text never picks, and measure both on `texts`.

    All layers keep the same number of atoms, that of the layer that uses most; the others fill up with unused ones.
    Raises TrainError for another FFN kind than dsc, a model without a tokenizer, or a text of one token.
    """
    source = open_source(model)
    config = source.config
    c = config.ffn
    if not isinstance(c, DscConfig):
        raise TrainError(f"{model}: its FFN is {c.kind}; only dsc has atoms to drop")
    tokenizer = Tokenizer.load(model)
    if tokenizer is None:
        raise TrainError(f"{model}: has no tokenizer; a calibration text needs one")
    ids = tokenizer.encode(calibration, add_special_tokens=False)
    if len(ids) < 2:
        raise TrainError(f"the calibration text has {len(ids)} tokens; picks are counted from 2 on")
    source.check()
    tensors = dict(source.weights())
    usage = usage_on(config, {name: tensor.float() for name, tensor in tensors.items()}, ids)
    size = max(c.atoms_per_token, *(len(layer) for layer in usage.live))
    for i, picks in enumerate(usage.picks):
        kept = picks.argsort(descending=True, stable=True)[:size].sort().values
        for name in PER_ATOM:
            full = f"model.layers.{i}.mlp.{name}"
            if full in tensors:
                tensors[full] = tensors[full][kept]
    smaller = config.model_copy(update={"ffn": c.model_copy(update={"num_atoms": size})})
    save_checkpoint(smaller, tensors, out)
    for name in FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    measured = []
    for folder in (model, out):
        with LLM(str(folder), dtype="float32") as llm:
            measured.append({name: evaluate(llm, text) for name, text in texts.items()})
    losses = {name: (measured[0][name], measured[1][name]) for name in texts}
    return Pruned([len(layer) for layer in usage.live], c.num_atoms, size, losses)
