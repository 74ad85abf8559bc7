"""`dsc-serve train`, from nothing to a model that generates, and `dsc-serve evaluate` on it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from dsc_serve import LLM, SamplingParams
from dsc_serve.cli import main
from dsc_serve.train import clock
from dsc_serve.train.clock import seconds
from dsc_serve.train.evaluation import evaluate, windows_of
from dsc_serve.train.record import read_log
from dsc_serve.train.settings import load_settings, preset_file


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke") / "run"
    result = run("train", "--preset", "smoke", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_smoke_learns_its_sentences_and_generates(smoke: Path) -> None:
    summary = json.loads((smoke / "summary.json").read_text())
    assert summary["held_out_loss"] < 1.5, "0.75 where it was measured; 6.2 is what knowing nothing costs"
    atoms: int = load_settings(preset_file("smoke")).model["ffn"]["num_atoms"]
    # Dead ones are revived as it goes. Which few are out of use at its end, the processor's arithmetic decides.
    assert len(summary["dead"]) == 2 and max(summary["dead"]) <= atoms // 8
    with LLM(str(smoke / "model")) as llm:
        output = llm.generate("The captain", SamplingParams(temperature=0, max_tokens=40))[0]
    assert len(output.token_ids) == 40
    assert "." in output.text


def test_smoke_leaves_log_plots_and_card(smoke: Path) -> None:
    lines = read_log(smoke / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(10, 201, 10))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 50, 100, 150, 200]
    assert all(len(line["used"]) == len(line["signal"]) == 2 for line in lines if "loss" in line)
    for name in ("loss", "usage", "signal"):
        svg = (smoke / f"{name}.svg").read_text()
        assert svg.startswith("<svg")
        assert "polyline" in svg
    card = (smoke / "card.md").read_text()
    assert "**The captain**" in card
    assert "| sentences | " in card


def test_a_finished_run_is_not_trained_again(smoke: Path) -> None:
    weights = (smoke / "model" / "model.safetensors").stat().st_mtime_ns
    assert run("train", "--preset", "smoke", "--out", smoke).exit_code == 0
    assert (smoke / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_trained_and_served_loss_agree(smoke: Path, tmp_path: Path) -> None:
    summary = json.loads((smoke / "summary.json").read_text())
    text = smoke / "data" / "held_out" / "sentences.txt"
    result = run("evaluate", smoke / "model", "--text", text, "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "result.json").read_text())
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert found["tokens"] == summary["held_out_tokens"]
    assert found["loss"] == pytest.approx(summary["held_out_loss"], abs=1e-3)
    assert found["bits_per_byte"] == pytest.approx(summary["held_out_bits_per_byte"], abs=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_evaluate_is_total_bits_over_total_bytes(smoke: Path) -> None:
    text = "The captain lost the map. Then the miller found the map near the harbour at noon. " * 12
    with LLM(str(smoke / "model")) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(text)
        found = evaluate(llm, text)
        nats, size = 0.0, 0
        for start in range(0, len(ids) - 128, 128):
            window = ids[start : start + 129]
            log_p = llm.logits([window[:-1]])[0].double().log_softmax(-1)
            nats -= float(log_p.gather(1, torch.tensor(window[1:])[:, None]).sum())
            size += len(llm.tokenizer.decode(window[1:]).encode())
    assert found.tokens == (len(ids) - 1) // 128 * 128
    assert found.nats == pytest.approx(nats)
    assert found.size == size


def test_evaluate_names_what_is_wrong(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    for text, words in (("empty.txt", "0 tokens"), ("binary.txt", "not readable UTF-8"), ("none.txt", "no such file")):
        result = run("evaluate", smoke / "model", "--text", tmp_path / text)
        assert result.exit_code == 1
        assert words in result.output


def test_windows_share_their_edges() -> None:
    assert windows_of(list(range(10)), 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows_of(list(range(9)), 3) == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert windows_of([4, 5], 3) == [[4, 5]]


def test_a_time_limit_is_kept_and_ends_with_the_full_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by as much whenever it is looked at, whatever this machine does meanwhile."""
    looks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: 0.03 * next(looks)))
    changes = ["--set", "run.log_steps=1", "--set", "schedule.warmup=4"]
    result = run("train", "--preset", "smoke", "--out", tmp_path, "--time-limit", "24s", *changes)
    assert result.exit_code == 0, result.output
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "rate" in line]
    assert len(lines) > 10 and lines[-1]["rate"] < 0.2
    assert max(line["rate"] for line in lines) == 1.0
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] < 24


def test_another_run_in_the_same_folder_is_refused(smoke: Path) -> None:
    result = run("train", "--preset", "smoke", "--out", smoke, "--set", "run.seed=5")
    assert result.exit_code == 1
    assert "other settings" in result.output


def test_settings_of_a_run_that_never_began_can_be_mended(tmp_path: Path) -> None:
    small = ["--preset", "smoke", "--out", tmp_path, "--set", "schedule.steps=1", "--set", "data.sentences=60"]
    (tmp_path / "short.txt").write_text("one paragraph only")
    assert "too short" in run("train", *small, "--text", tmp_path / "short.txt").output
    result = run("train", *small, "--set", "run.samples=[]")
    assert result.exit_code == 0, result.output


def test_a_time_limit_that_leaves_no_time_to_train_is_refused(tmp_path: Path) -> None:
    result = run("train", "--preset", "smoke", "--out", tmp_path, "--time-limit", "2s", "--set", "data.sentences=60")
    assert result.exit_code == 1 and "the time limit of 2 s leaves none to train" in result.output
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04cut"])
def test_a_damaged_checkpoint_is_named(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(damage)
    result = run("train", "--preset", "smoke", "--out", tmp_path)
    assert result.exit_code == 1 and "state.pt: not a readable checkpoint" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "paper"], "no text given"),
        (["--preset", "smoke", "--time-limit", "soon"], "time limit 'soon'"),
        (["--preset", "smoke", "--set", "run.sed=1"], "run.sed"),
        (["--preset", "smoke", "--set", "optimiser.rate=-1"], "optimiser.rate"),
        (["--preset", "smoke", "--set", "model.hidden_size=64.5"], "hidden_size"),
        (["--preset", "smoke", "--set", "model.vocab_size=100"], "at least 257"),
        (["--preset", "smoke", "--set", "budget.total=1e6", "--set", "budget.active=5e5"], "leave one out"),
        (["--preset", "smoke", "--set", "model.max_position_embeddings=64"], "a phase's length is 128"),
        (["--preset", "smoke", "--set", "schedule.phases=[]"], "schedule"),
        (["--preset", "smoke", "--set", "optimiser.betas=[0.9,1.0]"], "optimiser.betas.1: Input should be less than 1"),
        (["--preset", "smoke", "--set", "model.eos_token_id=3"], "model.eos_token_id is given"),
        (["nowhere.toml"], "no such file"),
    ],
)
def test_bad_settings_are_named(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


def test_times() -> None:
    assert [seconds(text) for text in ("90", "90s", "1.5m", "2.5h")] == [90, 90, 90, 9000]
