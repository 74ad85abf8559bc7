"""Training states that earlier versions wrote go on; those of a later version are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.small_models import DATA

from dsc_serve.train.checkpoint import FORMAT, load_state, save_state
from dsc_serve.train.record import read_log
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import TrainError

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_run_goes_on_from_an_old_state(number: int, tmp_path: Path) -> None:
    old, out = DATA / "old" / str(number), tmp_path / "run"
    out.mkdir()
    shutil.copy(old / "state.pt", out)
    settings = (old / "run.toml").read_text()
    (tmp_path / "run.toml").write_text(settings.replace("steps = 8", "steps = 11"))
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs(300)))
    command = [sys.executable, "-m", "dsc_serve.cli", "train", str(tmp_path / "run.toml")]
    ran = subprocess.run([*command, "--text", str(tmp_path / "text.txt"), "--out", str(out)], capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [9, 10, 11]


def test_a_state_of_a_newer_version_is_refused_in_one_line(tmp_path: Path) -> None:
    save_state({"step": 3}, tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt", CPU) == {"step": 3}
    for number in (FORMAT + 1, 0, "2", True):
        save_state({"step": 3, "format": number}, tmp_path / "state.pt")
        with pytest.raises(TrainError, match=rf"state\.pt: format is {number!r}; this version reads 1 to {FORMAT}"):
            load_state(tmp_path / "state.pt", CPU)
    torch.save([1], tmp_path / "state.pt")
    with pytest.raises(TrainError, match="it holds a list"):
        load_state(tmp_path / "state.pt", CPU)
