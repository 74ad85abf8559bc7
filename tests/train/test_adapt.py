"""Adapters are trained of a frozen base: what is written is served, and acts as it did in training."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.small_models import small_config, wide_tensors

from dsc_serve import LLM
from dsc_serve.cli import main
from dsc_serve.config import ConfigError
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.train.adapt.network import AdaptedNetwork
from dsc_serve.train.adapt.settings import adapt_settings
from dsc_serve.train.adapt.trainer import AdapterTrainer
from dsc_serve.train.clock import MARGIN_S, TrainingClock
from dsc_serve.train.corpus import train_tokenizer
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import TrainError

VOCABULARY = 320
LLAMA = {
    "vocab_size": VOCABULARY,
    "norm_type": "rmsnorm",
    "hidden_act": "silu",
    "mlp_gated": True,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "position_embedding_type": "rope",
}
SMALL = (
    "rank=4",
    "alpha=8",
    "length=32",
    "rows=2",
    "steps=12",
    "warmup=2",
    "rate=0.01",
    "evaluate_steps=6",
    "log_steps=3",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    config = small_config("dense", **LLAMA)
    save_checkpoint(config, wide_tensors(config), folder)
    train_tokenizer(paragraphs(200).split("\n\n"), VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    whole = paragraphs(600).split("\n\n")
    for i, name in enumerate(("fables", "letters", "psalms")):
        (folder / f"{name}.txt").write_text("\n\n".join(whole[200 * i : 200 * (i + 1)]), "utf8")
    return sorted(folder.iterdir())


def trainer(base: Path, texts: list[Path], out: Path, *changes: str) -> AdapterTrainer:
    return AdapterTrainer(adapt_settings(("dtype=float32", "threads=1", *SMALL, *changes)), base, texts, out, "base")


def tensors_of(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "adapters" / name / "adapter_model.safetensors")


def max_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def run(base: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    trainer(base, texts, out).run()
    return out


def test_losses_fall_and_are_told_by_text(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (12, 3 * 2 * 32 * 12)
    for name in ("fables", "letters", "psalms"):
        bits = summary["bits_per_byte"][name]
        assert bits["adapted"] < 0.95 * bits["base"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 6, 12]
    assert set(lines[-1]["held_out_bits_per_byte"]) == {"fables", "letters", "psalms"}
    assert (run / "loss.svg").is_file() and "psalms" in (run / "texts.svg").read_text()


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


def test_gradients_are_those_of_the_merged_weights(base: Path) -> None:
    """By finite differences of the loss, in every kind of module."""
    source = open_source(base)
    weights = {name: tensor.double() for name, tensor in source.weights().items()}
    settings = adapt_settings(SMALL)
    network = AdaptedNetwork(source.config, weights, 2.0, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    from dsc_serve.model.adapter import module_shapes

    updates = {
        key: tuple(
            (0.1 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).requires_grad_()
            for shape in ((settings.rank, into), (out, settings.rank))
        )
        for key, (out, into) in module_shapes(source.config).items()
    }
    windows = torch.randint(0, VOCABULARY, (2, 1, 9), generator=generator)
    torch.stack(network.losses(updates, windows)).sum().backward()  # type: ignore[arg-type, no-untyped-call]
    for pair in updates.values():
        for tensor in pair:
            assert tensor.grad is not None
            place, step = (1, 2, 3), 1e-6
            moved = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor[place] += sign * step
                    moved.append(float(torch.stack(network.losses(updates, windows)).sum()))  # type: ignore[arg-type]
                    tensor[place] -= sign * step
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(tensor.grad[place]), rel=1e-3, abs=1e-6)


def test_who_is_trained_beside_it_does_not_matter(base: Path, texts: list[Path], run: Path, tmp_path: Path) -> None:
    trainer(base, texts[1:2], tmp_path).run()
    together, alone = tensors_of(run, "letters"), tensors_of(tmp_path, "letters")
    assert max_difference(together, alone) < 1e-4  # sums of other shapes round otherwise
    assert max_difference(together, tensors_of(run, "psalms")) > 1e-2


def test_a_run_that_was_stopped_ends_alike_bit_for_bit(
    base: Path, texts: list[Path], run: Path, tmp_path: Path
) -> None:
    assert trainer(base, texts, tmp_path).run(until=7) is None
    assert not (tmp_path / "adapters").exists()
    trainer(base, texts, tmp_path).run()
    for name in ("fables", "letters", "psalms"):
        assert max_difference(tensors_of(run, name), tensors_of(tmp_path, name)) == 0


def test_the_base_stays_as_it_is(base: Path, texts: list[Path], tmp_path: Path) -> None:
    own = trainer(base, texts, tmp_path)
    before = {name: tensor.clone() for name, tensor in own.network.weights.items()}
    own.run(until=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.network.weights.items())


def test_the_faster_dtype_is_measured_and_kept(base: Path, texts: list[Path], tmp_path: Path) -> None:
    settings = adapt_settings((*SMALL, "threads=1"))
    first = AdapterTrainer(settings, base, texts, tmp_path, "base")
    assert first.dtype in ("float32", "bfloat16")
    first.run(until=2)
    assert AdapterTrainer(settings, base, texts, tmp_path, "base").dtype == first.dtype


def test_bfloat16_trains_too(base: Path, texts: list[Path], tmp_path: Path) -> None:
    summary = trainer(base, texts, tmp_path, "dtype=bfloat16").run()
    assert summary is not None
    assert all(bits["adapted"] < bits["base"] for bits in summary["bits_per_byte"].values())
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(tmp_path, "fables").values())


def test_only_the_modules_that_are_named_are_trained(base: Path, texts: list[Path], tmp_path: Path) -> None:
    trainer(base, texts[:1], tmp_path, "modules=q,v", "steps=2").run()
    names = {name.split(".")[-3] for name in tensors_of(tmp_path, "fables")}
    assert names == {"q_proj", "v_proj"}


def test_the_command_trains_and_tells(base: Path, texts: list[Path], tmp_path: Path) -> None:
    words = ["adapt", "--base", str(base), "--out", str(tmp_path / "run")]
    words += [word for text in texts for word in ("--text", str(text))]
    words += [word for change in ("dtype=float32", *SMALL, "steps=3") for word in ("--set", change)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "letters: held out " in result.output
    assert "3 steps, 576 tokens in float32" in result.output
    other = CliRunner().invoke(main, [*words, "--set", "rank=5"])
    assert other.exit_code == 1 and "holds a run with other settings" in other.output


def test_a_time_limit_that_permits_no_step_writes_no_adapter(base: Path, texts: list[Path], tmp_path: Path) -> None:
    words = ["adapt", "--base", str(base), "--out", str(tmp_path / "run"), "--time-limit", "2s"]
    words += ["--text", str(texts[0]), *(word for change in ("dtype=float32", *SMALL) for word in ("--set", change))]
    for _ in range(2):  # and when it is started again
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 1
        assert "the time limit of 2 s leaves none to train: preparation took" in result.output
    assert not (tmp_path / "run" / "adapters").exists() and not (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_may_begin_takes_a_step() -> None:
    clock = TrainingClock(None, 5)
    clock.limit = clock.spent + MARGIN_S + 0.05
    clock.begin()
    time.sleep(0.1)
    assert clock.share(0) == 0 and clock.share(1) > 1


def test_the_log_of_a_finished_run_is_closed(base: Path, texts: list[Path], tmp_path: Path) -> None:
    own = trainer(base, texts[:1], tmp_path, "steps=1")
    own.run()
    with pytest.raises(ValueError, match="closed file"):
        own.record.write({"step": 2})


@pytest.mark.parametrize("change", ["rnk=4", "rank", "rank=0", "modules=q,q", "modules=w", "rate=0", "kind=dora"])
def test_settings_that_cannot_be_meant(change: str) -> None:
    with pytest.raises(ConfigError, match=change.partition("=")[0]):
        adapt_settings((change,))


def test_bases_that_are_not_trained_are_named(texts: list[Path], tmp_path: Path) -> None:
    config = small_config("dsc", vocab_size=VOCABULARY)
    save_checkpoint(config, wide_tensors(config), tmp_path / "dsc")
    train_tokenizer(paragraphs(50).split("\n\n"), VOCABULARY).save(str(tmp_path / "dsc" / "tokenizer.json"))
    with pytest.raises(TrainError, match=r"ffn\.kind is 'dsc'"):
        trainer(tmp_path / "dsc", texts, tmp_path / "run")
