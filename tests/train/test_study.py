"""The study with tiny counts: all kinds, equal active parameters, the same tokens, and a table of what was run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.stepped_time import SteppedTime
from torch import Tensor

from dsc_serve.cli import main
from dsc_serve.train.corpus import WindowSampler
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.study import MARGIN, PROBE_STEPS
from dsc_serve.train.study_report import spread, table

SMALL = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=32",
    "budget.total=40000",
    "budget.active=30000",
    "schedule.warmup=2",
    'schedule.phases=[{"length":32,"step_tokens":256}]',
    "run.threads=1",
]


def study(folder: Path, *arguments: str) -> Result:
    (folder / "text.txt").write_text(paragraphs(300))
    sets = [part for change in SMALL for part in ("--set", change)]
    command = ["study", "--text", str(folder / "text.txt"), "--out", str(folder / "out"), *sets, *arguments]
    return CliRunner().invoke(main, command)


def test_every_kind_is_trained_and_reported(tmp_path: Path) -> None:
    markdown = tmp_path / "results.md"
    arguments = ["--set", "schedule.steps=6", "--seeds", "0,1", "--depths", "1,4", "--markdown", str(markdown)]
    result = study(tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["dsc-k1", "dsc-k4", "moe-k2", "molora-k2", "dense"]
    assert [run["entry"] for run in found["runs"]] == names * 2
    assert {run["tokens"] for run in found["runs"]} == {6 * 256}
    sparse = [run for run in found["runs"] if run["entry"] != "dense"]
    assert all(run["active_parameters"] == pytest.approx(30000, rel=0.02) for run in sparse)
    text = markdown.read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["FFN", *names]
    assert "±" in text
    assert (tmp_path / "study_loss.svg").read_text().count("<polyline") == 5
    again = study(tmp_path, *arguments)  # nothing is trained twice
    assert again.exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == found["runs"]


def test_steps_are_planned_from_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SteppedTime(monkeypatch, lambda run, _: 1 if run.config.ffn.kind == "dsc" else 2)
    arguments = ["--time-limit", "400s", "--seeds", "0", "--depths", "1", "--set", "run.checkpoint_s=1000"]
    result = study(tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    probes = (1 + PROBE_STEPS) * 7
    assert plan == {"steps": int(MARGIN * (400 - probes) / 7), "spent": probes}
    assert found["steps"] == plan["steps"]
    assert found["skipped"] == []
    assert found["seconds"] == probes + 7 * plan["steps"] < 400


def test_every_kind_sees_the_same_windows_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    take = WindowSampler.take

    def recorded(self: WindowSampler, count: int, length: int) -> Tensor:
        windows = take(self, count, length)
        seen.append(windows.tolist())
        return windows

    monkeypatch.setattr(WindowSampler, "take", recorded)
    result = study(tmp_path, "--set", "schedule.steps=3", "--seeds", "0,1", "--depths", "1")
    assert result.exit_code == 0, result.output
    runs = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    assert runs == [runs[0]] * 4 + [runs[4]] * 4
    assert len({str(windows) for windows in runs[0] + runs[4]}) == 6


def test_what_does_not_finish_in_time_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text('{"steps": 100000, "spent": 0.0}')
    result = study(tmp_path, "--time-limit", "4s", "--seeds", "0", "--depths", "1")
    assert result.exit_code == 0, result.output
    assert "No run has finished" in result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["skipped"] == [f"{name}, seed 0" for name in ("dsc-k1", "moe-k2", "molora-k2", "dense")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "run.seed=3"], "--set run.seed: --seeds gives it"),
        (["--set", "run.evaluate_steps=3"], "--set run.evaluate_steps"),
        (["--set", "budget.kind=moe"], "--set budget.kind"),
        (["--set", "budget.k=8"], "--set budget.k"),
        (["--set", "schedule.steps=8", "--time-limit", "1h"], "--set schedule.steps: --time-limit plans them"),
        (["--depths", "0,1"], "--depths is '0,1'"),
        (["--depths", "4,4"], "--depths is '4,4'"),
        (["--depths", "4,9999"], "fewer than K = 9999"),
        (["--seeds", "1,1"], "--seeds is '1,1'"),
        (["--seeds", "1000000"], "--seeds is '1000000'"),
        (["--set", "model.mlp_gated=true"], "mlp_gated = True"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_done(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    result = study(tmp_path, *arguments)
    assert result.exit_code != 0
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_the_table_gives_mean_and_half_range() -> None:
    assert spread([1.0, 1.5]) == "1.2500 ± 0.2500"
    assert spread([2.0]) == "2.0000"
    assert table({"runs": [], "skipped": [], "steps": 1}, "command", "today") == "No run has finished.\n"
