"""Atoms that nobody picks: counted, dropped, or revived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.small_models import small_config, wide_tensors

from dsc_serve.cli import main
from dsc_serve.model.checkpoint import load_tensors, save_checkpoint, weight_files
from dsc_serve.model.config import DscConfig, load_config
from dsc_serve.train.corpus import prepare
from dsc_serve.train.ffn import TRAINED, FfnTrace, Pass
from dsc_serve.train.optimiser import Optimiser
from dsc_serve.train.prune import prune, usage_on
from dsc_serve.train.revive import revive
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import DataSettings, LossSettings, OptimiserSettings, TrainError
from dsc_serve.train.usage import TrainingUsage

ATOMS, DEAD = 12, (2, 5, 9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a tokenizer in which three atoms of each layer can never be picked."""
    (tmp_path / "text.txt").write_text(paragraphs(60))
    corpus = prepare([tmp_path / "text.txt"], DataSettings(), 300, tmp_path / "data")
    config = small_config("dsc", {"num_atoms": ATOMS}, vocab_size=300)
    tensors = wide_tensors(config)
    for i in range(config.num_hidden_layers):
        tensors[f"model.layers.{i}.mlp.router.bias"][list(DEAD)] = -100.0
    out = tmp_path / "model"
    save_checkpoint(config, tensors, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((corpus.folder / name).read_bytes())
    return out


def test_prune_drops_what_is_never_picked_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    text = paragraphs(60)
    found = prune(model, text, {"text": text}, tmp_path / "out")
    assert found.live == [9, 9]
    assert (found.before, found.after) == (12, 9)
    config = load_config(tmp_path / "out")
    assert isinstance(config.ffn, DscConfig)
    assert config.ffn.num_atoms == 9
    old, new = (load_tensors(weight_files(folder)) for folder in (model, tmp_path / "out"))
    kept = [i for i in range(ATOMS) if i not in DEAD]
    assert torch.equal(new["model.layers.1.mlp.atoms_v"], old["model.layers.1.mlp.atoms_v"][kept])
    before, after = found.losses["text"]
    assert after.loss == pytest.approx(before.loss, abs=1e-6)
    assert after.tokens == before.tokens > 1000


@pytest.mark.parametrize("tokens", [5, 96, 97, 110])
def test_every_token_of_the_calibration_text_counts_to_its_end(tokens: int) -> None:
    config = small_config("dsc")
    usage = usage_on(config, wide_tensors(config), [i % config.vocab_size for i in range(tokens)])
    assert [int(picks.sum()) for picks in usage.picks] == [tokens * 3] * config.num_hidden_layers


def test_prune_on_the_command_line(model: Path, tmp_path: Path) -> None:
    arguments = ["prune", str(model), "--calibration", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "atoms picked, per layer: 9, 9 of 12" in result.output
    assert "9 atoms per layer" in result.output
    assert "text (calibration): " in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ffn"]["num_atoms"] == 9


def test_prune_refuses_a_model_without_atoms(tmp_path: Path) -> None:
    config = small_config("dense")
    save_checkpoint(config, wide_tensors(config), tmp_path / "dense")
    with pytest.raises(TrainError, match="only dsc"):
        prune(tmp_path / "dense", "text", {}, tmp_path / "out")


def test_revived_atoms_are_picked_and_the_others_untouched() -> None:
    config = small_config("dsc", {"num_atoms": ATOMS})
    prefix = "model.layers.0.mlp."
    masters = {name: torch.nn.Parameter(tensor) for name, tensor in wide_tensors(config).items()}
    with torch.no_grad():
        masters[f"{prefix}router.bias"][list(DEAD)] = -100.0
    optimiser = Optimiser(masters, OptimiserSettings())
    for master in masters.values():
        master.grad = torch.ones_like(master)
    optimiser.step(1.0)

    def forward() -> FfnTrace:
        own = {k.removeprefix(prefix): w.detach() for k, w in masters.items() if k.startswith(prefix)}
        x = torch.randn(400, config.hidden_size, generator=torch.Generator().manual_seed(0))
        return TRAINED["dsc"](config, own, x, Pass(LossSettings(), training=False))[1]

    before = forward()
    usage = TrainingUsage()
    usage.add([before])
    assert usage.dead == [3]
    assert usage.used == [0.75]
    old = {name: master.detach().clone() for name, master in masters.items()}
    assert before.picks is not None
    assert before.routed is not None
    assert revive(masters, prefix, before.picks, before.routed, optimiser, seed=0) == 3
    after = forward().picks
    assert after is not None
    assert bool((after[list(DEAD)] > 0).all())
    others = [i for i in range(ATOMS) if i not in DEAD]
    for name in ("router.weight", "atoms_u"):
        full = f"{prefix}{name}"
        assert torch.equal(masters[full][others], old[full][others])
        assert not torch.equal(masters[full][list(DEAD)], old[full][list(DEAD)])
        moments = optimiser.parts[0].state[masters[full]]["exp_avg"]
        assert not moments[list(DEAD)].any()
        assert moments[others].any()


def test_nothing_to_revive_changes_nothing() -> None:
    masters: dict[str, torch.Tensor] = {}
    optimiser = Optimiser({"a": torch.nn.Parameter(torch.ones(1))}, OptimiserSettings())
    assert revive(masters, "", torch.ones(4), torch.ones(2, 3), optimiser, seed=0) == 0
    assert revive(masters, "", torch.zeros(4), torch.ones(2, 3), optimiser, seed=0) == 0
