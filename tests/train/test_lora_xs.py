"""Cores trained on the base's singular vectors: what is written is served, and acts as it did in training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_adapt import SMALL, base, texts

from dsc_serve import LLM
from dsc_serve.cli import main
from dsc_serve.config import ConfigError
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.cores.files import read_basis, read_cores
from dsc_serve.model.cores.singular import singular_pair
from dsc_serve.train.adapt.core_trainer import CoreTrainer
from dsc_serve.train.adapt.kinds import KINDS
from dsc_serve.train.adapt.moments import second_moments
from dsc_serve.train.adapt.settings import CoreSettings, settings_of
from dsc_serve.train.adapter_command import adapt_command
from dsc_serve.train.settings import TrainError

__all__ = ["base", "texts"]  # fixtures
NAMES = ("fables", "letters", "psalms")


def trainer(base: Path, texts: list[Path], out: Path, *changes: str) -> CoreTrainer:
    settings = settings_of(CoreSettings, ("dtype=float32", "threads=1", *SMALL, "rate=0.02", *changes))
    return CoreTrainer(settings, base, texts, out, "base")


@pytest.fixture(scope="module")
def run(base: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cores")
    trainer(base, texts, out).run()
    return out


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (9, 9)])
def test_the_basis_is_that_of_a_dense_decomposition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pair = singular_pair(weight, 4)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(pair.up.double() @ pair.down.double(), u[:, :4] * s[:4] @ v[:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair.down @ pair.down.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair.up.norm(dim=0), s[:4].float(), rtol=1e-5, atol=1e-5)
    assert bool((pair.down.gather(1, pair.down.abs().argmax(1, keepdim=True)) > 0).all())


def test_losses_fall_and_each_has_cores_of_its_own(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in NAMES:
        bits = summary["bits_per_byte"][name]
        assert bits["adapted"] < 0.97 * bits["base"]
    (file,) = (run / "adapters").glob(".basis-*")
    basis = read_basis(file)
    for name in NAMES:
        own = read_cores(run / "adapters" / name)
        assert (own.basis, own.kind, own.base) == (basis.digest, "lora-xs", "base")
        assert own.cores.keys() == basis.modules.keys() and not own.matrices and not own.certificate
        assert all(core.shape == (4, 4) for core in own.cores.values())


def test_what_is_written_is_served_and_acts_as_in_training(base: Path, texts: list[Path], run: Path) -> None:
    """Bits per byte through the engine are those that the trainer measured."""
    summary = json.loads((run / "summary.json").read_text())["bits_per_byte"]
    again = trainer(base, texts, run)
    with LLM(str(base), dtype="float32", threads=1, adapters=str(run / "adapters")) as llm:
        for tenant in again.tenants:
            (source,) = tenant.corpus.sources
            windows = list(tenant.corpus.held_windows(source, 32))[:64]
            ids = [window.tolist() for window, _ in windows]
            for key, adapter in (("adapted", tenant.name), ("base", None)):
                nats = sum(float(loss.sum()) for loss in llm.losses(ids, adapter=adapter))
                bits = nats / math.log(2) / sum(count for _, count in windows)
                assert bits == pytest.approx(summary[tenant.name][key], abs=2e-5)


def cores_of(out: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = (out / "adapters" / name).glob("cores-*")
    return load_file(file)


def max_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_run_that_was_stopped_ends_alike_and_company_does_not_matter(
    base: Path, texts: list[Path], run: Path, tmp_path: Path
) -> None:
    assert trainer(base, texts, tmp_path / "cut").run(until=7) is None
    assert not (tmp_path / "cut" / "adapters").exists()
    trainer(base, texts, tmp_path / "cut").run()
    trainer(base, texts[1:2], tmp_path / "alone").run()
    for name in NAMES:
        assert max_difference(cores_of(run, name), cores_of(tmp_path / "cut", name)) == 0
    assert max_difference(cores_of(run, "letters"), cores_of(tmp_path / "alone", "letters")) < 1e-3
    assert max_difference(cores_of(run, "letters"), cores_of(run, "psalms")) > 1e-2


def test_what_cannot_be_trained_is_named(base: Path, texts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"rank is 17, and k of layer 0 is \[16, 32\]"):
        trainer(base, texts, tmp_path, "rank=17")
    with pytest.raises(ConfigError, match="rank"):
        settings_of(CoreSettings, ("rank=0",))
    with pytest.raises(ConfigError, match="kind"):
        settings_of(CoreSettings, ("kind=lora",))


def test_the_command_trains_any_kind(base: Path, texts: list[Path], tmp_path: Path) -> None:
    (option,) = (own for own in adapt_command.params if own.name == "kind")
    assert list(option.type.choices) == list(KINDS)  # type: ignore[attr-defined]
    words = ["adapt", "--kind", "lora-xs", "--base", str(base), "--out", str(tmp_path / "run"), "--text", str(texts[0])]
    words += [word for change in ("dtype=float32", *SMALL, "steps=2") for word in ("--set", change)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "fables: held out " in result.output
    told = CliRunner().invoke(main, ["adapter", "inspect", str(tmp_path / "run" / "adapters" / "fables")])
    assert "form      lora-xs" in told.output and "none: it was made on this basis" in told.output


def test_moments_are_those_of_what_modules_take_in(base: Path, texts: list[Path]) -> None:
    source, found = open_source(base), second_moments(base, texts[0])
    config = source.config
    assert len(found) == 7 * config.num_hidden_layers
    q, gate = (found[f"model.layers.1.{name}_proj"] for name in ("self_attn.q", "mlp.gate"))
    for name, like in (("self_attn.k", q), ("self_attn.v", q), ("mlp.up", gate)):
        assert torch.equal(found[f"model.layers.1.{name}_proj"], like)
    assert found["model.layers.0.mlp.down_proj"].shape == (config.layers[0].ffn.size, config.layers[0].ffn.size)
    gain = source.weights()["model.layers.1.input_layernorm.weight"].double().square()
    trace = float((q.diagonal() / gain).sum())
    assert trace == pytest.approx(config.hidden_size, rel=1e-3), "behind an RMSNorm the mean square is its gain's"


def test_a_basis_is_whitened_by_a_text(base: Path, texts: list[Path], tmp_path: Path) -> None:
    words = ["adapt", "--base", str(base), "--out", str(tmp_path / "run"), "--text", str(texts[0].parent)]
    words += [word for change in ("dtype=float32", *SMALL, "steps=4") for word in ("--set", change)]
    assert CliRunner().invoke(main, words).exit_code == 0
    folders = [str(tmp_path / "run" / "adapters" / name) for name in NAMES]
    digests = []
    for name, options in (("plain", []), ("white", ["--whiten", str(texts[0]), "--base", str(base)])):
        result = CliRunner().invoke(
            main, ["adapter", "share", *folders, "--rank", "6", "--out", str(tmp_path / name), *options]
        )
        assert result.exit_code == 0, result.output
        (file,) = (tmp_path / name).glob(".basis-*")
        digests.append(file.name)
    assert digests[0] != digests[1]
