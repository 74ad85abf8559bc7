"""A run that is stopped at any moment goes on as if it had not been."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.stepped_time import SteppedTime

from dsc_serve.train.clock import MARGIN_S
from dsc_serve.train.record import read_log
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import TrainingPhase, load_settings
from dsc_serve.train.trainer import Trainer

SETTINGS = """
[model]
vocab_size = 300
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 32
[model.ffn]
kind = "dsc"
num_atoms = 24
atoms_per_token = 2
static_size = 32
[optimiser]
kind = "muon"
[schedule]
steps = 80
warmup = 10
micro_tokens = 64
phases = [{ until = 0.4, length = 16, step_tokens = 128 }, { length = 32, step_tokens = 128 }]
[run]
threads = 1
log_steps = 1
evaluate_steps = 50
checkpoint_s = 0.3
revive_steps = 15
"""


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dsc_serve.cli", "train", str(folder / "run.toml")]
    command += ["--text", str(folder / "text.txt"), "--out", str(out)]
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(folder: Path, out: Path) -> bytes:
    process = start(folder, out)
    try:
        assert process.wait(400) == 0, (folder / "output.log").read_text()
    finally:
        process.kill()
    return (out / "model" / "model.safetensors").read_bytes()


def kill_after(folder: Path, out: Path, step: int) -> None:
    process = start(folder, out)
    log = out / "log.jsonl"
    give_up = time.monotonic() + 300
    try:
        while process.poll() is None and time.monotonic() < give_up:
            lines = read_log(log)
            if lines and lines[-1]["step"] >= step and (out / "state.pt").is_file():
                break
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait(60) == -9, (folder / "output.log").read_text()


def test_kill_and_resume_gives_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(SETTINGS)
    (tmp_path / "text.txt").write_text(paragraphs(300))
    whole = finish(tmp_path, tmp_path / "whole")
    cut = tmp_path / "cut"
    kill_after(tmp_path, cut, 15)
    kill_after(tmp_path, cut, 45)
    assert finish(tmp_path, cut) == whole
    logs = [read_log(run / "log.jsonl") for run in (tmp_path / "whole", cut)]
    losses = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 81))


def trainer(folder: Path, out: Path, changes: Sequence[str], limit: float | None = None) -> Trainer:
    (folder / "run.toml").write_text(SETTINGS)
    (folder / "text.txt").write_text(paragraphs(300))
    return Trainer(load_settings(folder / "run.toml", changes), [folder / "text.txt"], out, time_limit=limit)


def run_to(run: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step_of = run._step

    def cut(phase: TrainingPhase, factor: float) -> tuple[float, float]:
        if run.step == step:
            run._save()
            raise KeyboardInterrupt
        return step_of(phase, factor)

    monkeypatch.setattr(run, "_step", cut)
    with pytest.raises(KeyboardInterrupt):
        run.run()


MOE = 'model.ffn={"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_size": 32}'


@pytest.mark.parametrize("change", [MOE, "run.threads=2"], ids=["moe", "two threads"])
def test_stop_and_resume_gives_the_same_weights(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [change, "schedule.steps=16", "run.revive_steps=5"]
    trainer(tmp_path, tmp_path / "whole", changes).run()
    run_to(trainer(tmp_path, tmp_path / "cut", changes), 9, monkeypatch)
    again = trainer(tmp_path, tmp_path / "cut", changes)
    assert again.step == 9
    again.run()
    whole, cut = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert cut == whole


def test_a_run_with_a_time_limit_goes_on_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = SteppedTime(monkeypatch, lambda _, phase: 1 if phase.length == 16 else 7)
    phases = '[{"until": 0.4, "length": 16, "step_tokens": 128}, {"length": 32, "step_tokens": 256}]'
    changes = [f"schedule.phases={phases}", "run.log_steps=3", "run.evaluate_steps=20", "run.checkpoint_s=1000"]

    def start() -> Trainer:
        return trainer(tmp_path, tmp_path / "out", changes, MARGIN_S + 100)

    run_to(start(), 30, monkeypatch)
    time.now += 1000
    summary = start().run()
    assert summary is not None
    assert 85 < summary["seconds"] <= 100, "a last step of 7 s fits in"
    log = read_log(tmp_path / "out" / "log.jsonl")
    lines = [line for line in log if "loss" in line]
    assert [line["step"] for line in lines] == list(range(3, 49, 3))
    rates = [line["rate"] for line in lines[4:]]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.12
    for before, line in zip([{"tokens": 0, "seconds": 0.0}, *lines], lines, strict=False):
        spent = line["seconds"] - before["seconds"]
        assert line["tokens_per_second"] == round((line["tokens"] - before["tokens"]) / spent)
    held_out = [(line["step"], line["tokens"]) for line in log if "held_out_loss" in line]
    assert held_out == [(0, 0), (20, 20 * 128), (40, 40 * 128)]


def test_a_run_given_up_before_its_first_step_looks_once(tmp_path: Path) -> None:
    for _ in range(2):
        assert trainer(tmp_path, tmp_path / "out", []).run(give_up=-1) is None
    assert [line["step"] for line in read_log(tmp_path / "out" / "log.jsonl")] == [0]
