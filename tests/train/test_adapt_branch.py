"""A bank and its tenants are trained together, and further tenants on it: what is written serves as it was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.small_models import small_config, wide_tensors

from dsc_serve import LLM
from dsc_serve.cli import main
from dsc_serve.config import ConfigError
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.config import DscConfig, load_config
from dsc_serve.model.graft import graft
from dsc_serve.train.adapt.branch import BranchNetwork
from dsc_serve.train.adapt.branch_trainer import MODEL, BranchTrainer
from dsc_serve.train.adapt.settings import BranchSettings, settings_of
from dsc_serve.train.corpus import train_tokenizer
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import TrainError

VOCABULARY = 320
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "norm_type": "rmsnorm",
    "hidden_act": "silu",
    "mlp_gated": True,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SMALL = ("length=32", "rows=2", "steps=12", "warmup=2", "rate=0.01", "evaluate_steps=6", "log_steps=3", "gamma=0.3")
NAMES = ("fables", "letters", "psalms")
ALONE = ("dtype=float32", "threads=1")


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = small_config("dense", **LLAMA, num_hidden_layers=3)
    save_checkpoint(config, wide_tensors(config), folder / "dense")
    train_tokenizer(paragraphs(200).split("\n\n"), VOCABULARY).save(str(folder / "dense" / "tokenizer.json"))
    graft(folder / "dense", folder / "grafted", 40, 3, "1-2")
    return folder / "grafted"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    whole = paragraphs(600).split("\n\n")
    for i, name in enumerate(NAMES):
        (folder / f"{name}.txt").write_text("\n\n".join(whole[200 * i : 200 * (i + 1)]), "utf8")
    return sorted(folder.iterdir())


def trainer(base: Path, texts: list[Path], out: Path, *changes: str, frozen: bool = False) -> BranchTrainer:
    settings = settings_of(BranchSettings, (*ALONE, *SMALL, *changes))
    return BranchTrainer(settings, base, texts, out, "base", frozen=frozen)


@pytest.fixture(scope="module")
def run(grafted: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    trainer(grafted, texts, out).run()
    return out


def tenant_of(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "adapters" / name / "dsc_adapter.safetensors")


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / MODEL / "model.safetensors")


def test_losses_fall_and_terms_are_told(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in NAMES:
        bits = summary["bits_per_byte"][name]
        assert bits["adapted"] < 0.98 * bits["base"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [3, 6, 9, 12]
    for line in steps:
        assert line["terms"] > 0 and line["gamma"] > 0
        assert all(signal > 0 for signal in line["signal"]) and all(0 < share <= 1 for share in line["used"])
    assert (run / "signal.svg").is_file()


def test_only_the_branch_changes(grafted: Path, run: Path) -> None:
    before, after = load_file(grafted / "model.safetensors"), tensors_of(run)
    changed = {name.split("mlp.")[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"router.weight", "router.bias", "router_norm.weight", "router_norm.bias", "atoms_u", "atoms_v"}
    assert not after["model.layers.1.mlp.gamma"].any(), "the base is served as it was"
    one, other = (load_config(folder).ffn for folder in (grafted, run / MODEL))
    assert isinstance(one, DscConfig) and isinstance(other, DscConfig) and one.bank != other.bank
    assert tenant_of(run, "fables")["b"].shape == (2, 40) and tenant_of(run, "fables")["gamma"].shape == (2, 32)


@pytest.mark.parametrize("frozen", [False, True], ids=["with the bank", "on a bank"])
def test_what_is_written_is_served_and_acts_as_in_training(
    grafted: Path, texts: list[Path], run: Path, tmp_path: Path, frozen: bool
) -> None:
    """Bits per byte through the engine are those that the trainer measured."""
    folder, model = run, run / MODEL
    own = trainer(grafted, texts, run)
    if frozen:
        folder, own = tmp_path, trainer(model, texts[:2], tmp_path, frozen=True)
        own.run()
        assert not (folder / MODEL).exists()
    summary = json.loads((folder / "summary.json").read_text())["bits_per_byte"]
    with LLM(str(model), dtype="float32", threads=1, adapters=str(folder / "adapters")) as llm:
        for tenant in own.tenants:
            (source,) = tenant.corpus.sources
            windows = list(tenant.corpus.held_windows(source, 32))[:64]
            ids = [window.tolist() for window, _ in windows]
            for key, adapter in (("adapted", tenant.name), ("base", None)):
                nats = sum(float(loss.sum()) for loss in llm.losses(ids, adapter=adapter))
                bits = nats / math.log(2) / sum(count for _, count in windows)
                assert bits == pytest.approx(summary[tenant.name][key], abs=5e-5)


def test_tenants_of_a_bank_do_not_know_of_each_other(run: Path, texts: list[Path], tmp_path: Path) -> None:
    trainer(run / MODEL, texts, tmp_path / "all", frozen=True).run()
    trainer(run / MODEL, texts[1:2], tmp_path / "one", frozen=True).run()
    together, alone = tenant_of(tmp_path / "all", "letters"), tenant_of(tmp_path / "one", "letters")
    other = tenant_of(tmp_path / "all", "psalms")
    for name, tensor in alone.items():
        assert float((tensor - together[name]).abs().max()) < 1e-3 < float((tensor - other[name]).abs().max())
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())["bits_per_byte"]["letters"]
    assert summary["adapted"] < summary["base"]


@pytest.mark.parametrize("frozen", [False, True], ids=["with the bank", "on a bank"])
def test_a_run_that_was_stopped_ends_alike_bit_for_bit(
    grafted: Path, texts: list[Path], run: Path, tmp_path: Path, frozen: bool
) -> None:
    base = run / MODEL if frozen else grafted
    trainer(base, texts, tmp_path / "whole", frozen=frozen).run()
    assert trainer(base, texts, tmp_path / "cut", frozen=frozen).run(until=7) is None
    assert not (tmp_path / "cut" / "adapters").exists()
    trainer(base, texts, tmp_path / "cut", frozen=frozen).run()
    for name in NAMES:
        one, other = tenant_of(tmp_path / "whole", name), tenant_of(tmp_path / "cut", name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    if not frozen:
        one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_gradients_are_those_of_the_losses_and_terms(grafted: Path) -> None:
    """By finite differences, of numbers of an atom that is picked."""
    source = open_source(grafted)
    weights = {name: tensor.double() for name, tensor in source.weights().items()}
    settings = settings_of(BranchSettings, ("z=0.1", "budget=0.5", "load=0.1", "frame=0.01", "signal_floor=9"))
    network = BranchNetwork(source.config, weights, settings, False, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, VOCABULARY, (2, 1, 9), generator=generator)
    branches: dict[int, dict[str, torch.Tensor]] = {}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp."
        own = {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}
        branches[layer] = {name: one.clone() for name, one in own.items() if "static" not in name}
        branches[layer]["b"] = torch.randn(2, 40, generator=generator, dtype=torch.float64)
        branches[layer]["gamma"] = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    for own in branches.values():
        for tensor in own.values():
            tensor.requires_grad_()

    def total() -> torch.Tensor:
        losses = torch.stack(network.branched(branches, windows, training=True))
        return losses.sum() + network.trace.terms

    total().backward()  # type: ignore[no-untyped-call]
    picked = int(network.trace.picks[1].argmax())
    places: dict[str, tuple[int, ...]] = {
        "b": (1, picked),
        "gamma": (0, 3),
        "router.weight": (picked, 2),
        "router.bias": (picked,),
        "atoms_u": (picked, 1),
        "atoms_v": (picked, 4),
        "router_norm.weight": (5,),
        "router_norm.bias": (6,),
    }
    for name, place in places.items():
        tensor, step, moved = branches[2][name], 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[place] += sign * step
                moved.append(float(total()))
                tensor[place] -= sign * step
        assert tensor.grad is not None and float(tensor.grad[place]) != 0
        slope = (moved[0] - moved[1]) / (2 * step)
        assert slope == pytest.approx(float(tensor.grad[place]), rel=1e-3, abs=1e-6), name


def test_a_bank_that_stays_has_no_gradient(run: Path, texts: list[Path], tmp_path: Path) -> None:
    own = trainer(run / MODEL, texts[:1], tmp_path, frozen=True)
    before = [(one, one.clone()) for bank in own.bank.values() for one in bank.values()]
    own.run(until=2)
    assert all(torch.equal(one, kept) and not one.requires_grad for one, kept in before)


def test_bfloat16_trains_too(grafted: Path, texts: list[Path], tmp_path: Path) -> None:
    summary = trainer(grafted, texts[:2], tmp_path, "dtype=bfloat16").run()
    assert summary is not None
    assert all(bits["adapted"] < bits["base"] for bits in summary["bits_per_byte"].values())


def test_the_commands_train_and_tell(grafted: Path, texts: list[Path], tmp_path: Path) -> None:
    def adapt(*words: str) -> Any:
        changes = [word for change in (*ALONE, *SMALL, "steps=3") for word in ("--set", change)]
        return CliRunner().invoke(main, ["adapt", "--kind", "dsc", *words, *changes])

    both = [word for text in texts[:2] for word in ("--text", str(text))]
    result = adapt("--base", str(grafted), "--out", str(tmp_path / "run"), *both)
    assert result.exit_code == 0, result.output
    assert "letters: held out " in result.output and "3 steps, 384 tokens in float32" in result.output
    bank = str(tmp_path / "run" / MODEL)
    result = adapt("--bank", bank, "--out", str(tmp_path / "more"), "--text", str(texts[2]))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "more" / "adapters" / "psalms" / "dsc_adapter.safetensors").is_file()
    result = adapt("--base", bank, "--out", str(tmp_path / "more"), "--text", str(texts[2]))
    assert result.exit_code == 1 and "holds a run with other settings" in result.output
    for words in (("--bank", bank, "--base", bank), ()):
        result = adapt(*words, "--out", str(tmp_path / "none"), "--text", str(texts[2]))
        assert result.exit_code == 2 and "either --base or --bank" in result.output
    result = adapt("--base", bank, "--out", str(tmp_path / "none"), "--text", str(texts[2]), "--set", "rank=3")
    assert result.exit_code == 1 and "--set rank=3: expected FIELD=VALUE with one of" in result.output


def test_settings_and_bases_that_cannot_be_meant(grafted: Path, texts: list[Path], tmp_path: Path) -> None:
    for change in ("gamma=0", "load=-1", "kind=lora", "tenant_factor=x"):
        with pytest.raises(ConfigError, match=change.partition("=")[0]):
            settings_of(BranchSettings, (change,))
    with pytest.raises(TrainError, match="it has no bank; `dsc-serve graft` makes it one"):
        trainer(grafted.parent / "dense", texts, tmp_path / "run")
    with pytest.raises(TrainError, match="length is 65; the base's context is 64"):
        trainer(grafted, texts, tmp_path / "run", "length=65")
