"""A run that is killed at any moment ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from dsc_serve.train.sentences import paragraphs

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
    assert process.wait(150) == 0, (folder / "output.log").read_text()
    return (out / "model" / "model.safetensors").read_bytes()


def kill_after(folder: Path, out: Path, step: int) -> None:
    process = start(folder, out)
    log = out / "log.jsonl"
    give_up = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < give_up:
        lines = log.read_text().splitlines() if log.is_file() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step and (out / "state.pt").is_file():
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait(30) == -9, (folder / "output.log").read_text()


def test_kill_and_resume_gives_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(SETTINGS)
    (tmp_path / "text.txt").write_text(paragraphs(300))
    whole = finish(tmp_path, tmp_path / "whole")
    cut = tmp_path / "cut"
    kill_after(tmp_path, cut, 15)
    kill_after(tmp_path, cut, 45)
    assert finish(tmp_path, cut) == whole
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (tmp_path / "whole", cut)
    ]
    losses = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 81))
