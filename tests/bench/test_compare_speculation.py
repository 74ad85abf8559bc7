"""`bench compare speculation`: every figure is there, in parts, and the report adds up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.speculation.asked import SpeculationComparison
from dsc_serve.bench.compare.speculation.found import load
from dsc_serve.bench.compare.speculation.running import PAGE, RESULTS, TABLES, run_speculation
from dsc_serve.bench.compare.speculation.texts import TASKS, TextTask
from dsc_serve.bench.step.scripted import ScriptedRunner
from dsc_serve.bench.step.speculation import Task, engine_for, run
from dsc_serve.cli import main
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.engine.draft_time import DraftCost, DraftTime
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.structured_outputs import StructuredOutputs

SMALL = SpeculationComparison(
    presets=("paper",),
    streams=(1, 2),
    rates=(0.0, 1.0),
    prompt_tokens=4,
    tokens=24,
    max_drafts=3,
    rounds=2,
    text_rounds=2,
    threads=1,
)


def compared(out: Path, models: Path, asked: SpeculationComparison = SMALL, **options: Any) -> tuple[Any, bool]:
    return run_speculation(asked, out, models, "dsc-serve bench compare speculation", lambda line: None, **options)


@pytest.fixture
def models(small_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Small ones in the place of those that would be made."""
    for kind in SMALL.systems:
        shutil.copytree(small_model(kind), tmp_path / "models" / f"paper-{kind}")
    return tmp_path / "models"


def test_systems_get_the_same_drafts(models: Path, tmp_path: Path) -> None:
    found, whole = compared(tmp_path / "out", models)
    assert whole
    keys = [(row.streams, row.round, row.system, row.rate) for row in found.drafted]
    assert len(set(keys)) == len(keys) == 2 * 2 * 4 * 3
    assert all(row.ms > 0 for row in found.drafted)
    for row in found.drafted:
        assert row.drafts == 0 if row.rate is None else row.drafts >= 0
        if row.drafts:
            assert row.right == row.rate
    widths = {(row.system, row.streams, row.width): row for row in found.widths}
    assert len(widths) == 4 * 2 * 4
    assert all((row.distinct is None) == (row.system == "dense") for row in widths.values())
    for system in ("dsc", "moe", "molora"):
        assert widths[system, 1, 0].distinct < widths[system, 2, 3].distinct
    report = (tmp_path / "out" / TABLES).read_text()
    assert "| dsc / moe | 2 |" in report and "no drafts" in report
    page = (tmp_path / "out" / PAGE).read_text()
    first = page[: page.index("<h2>")]
    assert first.count("<p>") == 3 and first.count("<svg") == 1 and "<table" in page[len(first) :]
    assert "Drafts that are right 1 of the time, to none" in first and "moe right 1 (baseline)" in first
    assert "output tokens per second" in first and "with them dsc / moe" in first
    assert_reported_again(tmp_path / "out", report)


def assert_reported_again(out: Path, tables: str) -> None:
    """`bench report` makes the same of the kept results, there or in a document."""
    (out / TABLES).unlink()
    assert CliRunner().invoke(main, ["bench", "report", str(out)]).exit_code == 0
    assert (out / TABLES).read_text() == tables
    document = out.parent / "page.md"
    document.write_text("before\n<!-- drafts: begin -->\n<!-- drafts: end -->\nafter\n")
    done = CliRunner().invoke(main, ["bench", "report", str(out), "--into", str(document), "--name", "drafts"])
    assert done.exit_code == 0, done.output
    assert "| dsc / moe | 2 |" in document.read_text() and "drafts.results.json" in document.read_text()
    assert load(out.parent / "drafts.results.json") == load(out / RESULTS)


def test_it_goes_on_where_it_was_left(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = msgspec.structs.replace(SMALL, systems=("dsc", "moe"), streams=(1,))
    _, whole = compared(out, models, asked, minutes=1e-9)
    assert not whole
    first = load(out / RESULTS)
    assert len(first.widths) == 4 and not first.drafted
    parts = 1
    while not whole:
        _, whole = compared(out, models, asked, minutes=1e-9, resume=True)
        parts += 1
        assert parts < 9
    last = load(out / RESULTS)
    assert last.widths[:4] == first.widths
    assert len(last.widths) == 8 and len(last.drafted) == 2 * 2 * 3
    assert parts == 5  # two tables of widths, two rounds of all systems, and one that finds nothing missing
    with pytest.raises(ComparisonError, match="its tokens is 24"):
        compared(out, models, msgspec.structs.replace(asked, tokens=25), resume=True)
    more, _ = compared(out, models, msgspec.structs.replace(asked, rounds=3), resume=True)
    assert len(more.drafted) == 3 * 2 * 3


def test_a_script_is_what_a_stream_says(small_model: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(small_model()), threads=1)
    model, task = prepare_model(config), Task(2, 4, 12, 0.0)
    scripts = task.scripts(model.config.vocab_size)
    engine = engine_for(model, config, task, None, scripts)
    assert isinstance(engine.runner, ScriptedRunner)
    found = run(engine, task, None)
    assert found.answers == scripts
    assert found.token_ms > 0
    assert len({tuple(script) for script in scripts}) == 2


WORK = (
    TextTask("free", "The President of the", tokens=24),
    TextTask("predicted", "The President of the", predicted=True, tokens=40),
    TextTask("shaped", "A number", shape=StructuredOutputs(regex="[0-9]{3}-abcdefgh-[0-9]{12}"), tokens=40),
)


def test_real_work_gives_the_same_answers(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost nothing here: whether they pay on the machine that runs this is no promise."""
    monkeypatch.setattr(DraftTime, "cost", lambda self, single: DraftCost(0.0, 0.0))
    asked = msgspec.structs.replace(SMALL, systems=("dense",), streams=(1,), rates=())
    text_model = resolve_model("dsc-tiny")
    found, whole = compared(tmp_path / "out", models, asked, text_model=text_model, tasks=WORK)
    assert whole and found.text_model == "dsc-tiny"
    assert [(row.task, row.round) for row in found.texts] == [(task.name, n) for task in WORK for n in range(2)]
    assert all(row.same and row.gain > 0 for row in found.texts)
    predicted = [row for row in found.texts if row.task == "predicted"]
    assert all(row.drafted["prediction"] >= row.accepted["prediction"] > 0 for row in predicted)
    assert any(row.drafted["grammar"] for row in found.texts if row.task == "shaped")
    kept = json.loads((tmp_path / "out" / RESULTS).read_bytes())
    assert kept["texts"][0]["tokens"] == 24
    assert "| predicted |" in (tmp_path / "out" / TABLES).read_text()


def test_every_task_fits_a_small_model() -> None:
    """Prompts and schemas are what they are said to be; the tasks' names are each there once."""
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert all(task.begins in task.message for task in TASKS)
    for task in TASKS:
        if task.shape is not None:
            assert json.loads(task.shape.json or "")["required"] == ["orders"]


@pytest.mark.parametrize(
    ("comparison", "options", "words"),
    [
        ("speculation", ["--alone"], "--alone cannot be used with speculation"),
        ("speculation", ["--ratios", "x.json"], "--ratios cannot be used with speculation"),
        ("speculation", ["--system", "vllm"], "system 'vllm' is not in this comparison; it has dsc, moe"),
        ("quick", ["--text-model", "."], "--text-model can be used with speculation alone"),
    ],
)
def test_options_of_others_are_refused(tmp_path: Path, comparison: str, options: list[str], words: str) -> None:
    done = CliRunner().invoke(main, ["bench", "compare", comparison, "--out", str(tmp_path / "out"), *options])
    assert done.exit_code != 0
    assert words in done.output + str(done.exception)
