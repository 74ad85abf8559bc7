"""A study of adapters with tiny counts: every kind, every stage, and starts that go on where others stopped."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from test_adapt import SMALL, base, texts

from dsc_serve.cli import main
from dsc_serve.config import ConfigError
from dsc_serve.model.adapter_kinds import read_adapter
from dsc_serve.model.checkpoint import open_source
from dsc_serve.train.adapt.trainer import AdapterTrainer
from dsc_serve.train.adaptation_study import stages
from dsc_serve.train.adaptation_study.matrix import HeldOutText, Rows, expected_seconds, measure_rows
from dsc_serve.train.adaptation_study.plan import (
    STUDIED,
    EqualLora,
    StudyOptions,
    changes_of,
    equal_lora,
    kinds_of,
    run_settings,
)
from dsc_serve.train.adaptation_study.study import AdaptationStudy

__all__ = ["base", "texts"]  # fixtures
NAMES = ["fables", "letters", "psalms"]
CHANGES = tuple(own for own in SMALL if own.partition("=")[0] not in ("rank", "alpha", "steps"))
CHANGES += ("dtype=float32", "threads=1", "lora-xs.rate=0.02", "dsc.gamma=0.3")
SIZES = {"tokens": 256, "rank": 4, "basis": 5, "atoms": 40, "picks": 3, "windows": 2}


def command(base: Path, texts: list[Path], out: Path, *more: str) -> Result:
    words = ["adapter", "study", "--base", str(base), "--text", str(texts[0].parent), "--out", str(out)]
    words += [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    words += ["--dtype", "float32", *(word for change in CHANGES for word in ("--set", change)), *more]
    return CliRunner().invoke(main, words)


def study(base: Path, texts: list[Path], out: Path, kinds: str, time_limit: float | None = None) -> AdaptationStudy:
    options = StudyOptions(**SIZES, dtype="float32", changes=CHANGES)  # type: ignore[arg-type]
    return AdaptationStudy(
        base, "model", texts, out, options, kinds_of(kinds), time_limit=time_limit, report=lambda line: None
    )


@pytest.fixture(scope="module")
def whole(base: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("study") / "runs"
    return out, command(base, texts, out, "--markdown", str(out.parent / "page.md"))


@pytest.fixture
def result(whole: tuple[Path, Result]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((whole[0] / "results.json").read_text("utf8"))
    return found


def test_every_kind_is_trained_and_every_adapter_measured_on_every_text(
    whole: tuple[Path, Result], result: dict[str, Any]
) -> None:
    assert whole[1].exit_code == 0, whole[1].output
    assert result["missing"] == [] and set(result["base_bits"]) == set(NAMES)
    assert [name for name in result["kinds"] if name in STUDIED] == list(STUDIED)
    for name, kind in result["kinds"].items():
        assert set(kind["bits"]) == ({"mixed"} if name == "mixed" else set(NAMES))
        assert all(set(row) == set(NAMES) for row in kind["bits"].values())
        assert kind["tokens"] == 3 * 256, "all kinds see as many tokens"
    for name in ("lora", "mixed"):
        for text in NAMES:
            own = result["kinds"][name]["bits"]["mixed" if name == "mixed" else text][text]
            assert own < 0.99 * result["base_bits"][text]
    assert result["machine"] and result["base"] == {"name": "model", "layers": 2, "width": 32, "vocabulary": 320}


def test_the_matrix_is_what_the_trainer_measures(
    base: Path, texts: list[Path], whole: tuple[Path, Result], result: dict[str, Any]
) -> None:
    trainer = AdapterTrainer(run_settings(study(base, texts, whole[0], "lora").options, "lora"), base, texts,
                             whole[0] / "lora", "model", prepared=whole[0])  # fmt: skip
    held = study(base, texts, whole[0], "lora").held
    for i, text in enumerate(NAMES):
        nats = sum(
            float(trainer._loss(i, torch.tensor(window)[None, None], True).detach()) * (len(window) - 1)
            for window in held[text].windows
        )
        bits = nats / math.log(2) / held[text].size
        assert result["kinds"]["lora"]["bits"][text][text] == pytest.approx(bits, abs=2e-5)


def test_bytes_are_those_of_what_is_written(base: Path, whole: tuple[Path, Result], result: dict[str, Any]) -> None:
    """In memory in bfloat16; biases and scales in float32."""
    for name, kind in result["kinds"].items():
        if name == "mixed":
            assert kind["tenant_bytes"] == 0 and kind["shared_bytes"] == result["kinds"]["lora"]["tenant_bytes"]
            continue
        source = open_source(whole[0] / "dsc" / "model" if name == "dsc" else base)
        adapter = read_adapter(whole[0] / name / "adapters" / "fables", source.config, source.origin)
        assert kind["tenant_bytes"] == adapter.nbytes // (1 if name == "dsc" else 2), name
        assert (kind["shared_bytes"] > 0) == (name in ("lora-xs", "shared", "dsc"))
        if adapter.basis is not None:
            pairs = adapter.basis.pairs().values()
            assert kind["shared_bytes"] == sum(part.nbytes for pair in pairs for part in pair) // 2


def test_at_equal_bytes_stands_the_lora_that_is_nearest(result: dict[str, Any]) -> None:
    """Of rank 1 all modules take 440 numbers a layer, q and v 112, all of attention 224."""
    assert result["equal_bytes"] == {"lora-xs": "lora-r1-qv", "shared": "lora-r1-qkvo", "dsc": "lora-r1-qv"}
    size = {name: kind["tenant_bytes"] for name, kind in result["kinds"].items()}
    assert (size["lora-r1-qv"], size["lora-r1-qkvo"], size["lora"]) == (448, 896, 4 * 1760)
    assert (size["lora-xs"], size["shared"], size["dsc"]) == (448, 700, 576)


def test_a_larger_tenant_has_a_lora_of_a_higher_rank_beside_it(base: Path) -> None:
    config = open_source(base).config
    assert equal_lora(config, StudyOptions(rank=4, basis=5, atoms=1000), "dsc").name == "lora-r5"
    only = StudyOptions(rank=4, basis=5, atoms=1024, changes=("lora.modules=q,v",))
    assert equal_lora(config, only, "dsc").title == "LoRA of rank 19"
    assert equal_lora(config, only, "shared") == EqualLora(1, ("q",))


def test_what_the_basis_leaves_out_is_told_and_unaligned_adapters_are_refused(result: dict[str, Any]) -> None:
    assert set(result["certificates"]) == set(NAMES)
    for own in result["certificates"].values():
        assert 0 < own["median_share"] <= own["largest_share"] < 2**0.5 and own["largest_error"] > 0
    refusal = result["refusal"]
    assert refusal["refused"] and "cannot stand on this basis" in refusal["said"]
    assert refusal["left_out"][0] > refusal["max_error"]


def test_the_page_has_a_table_of_every_kind_and_the_same_command_changes_nothing(
    base: Path, texts: list[Path], whole: tuple[Path, Result], result: dict[str, Any]
) -> None:
    page = whole[0].parent / "page.md"
    text = page.read_text("utf8")
    for name, kind in result["kinds"].items():
        assert (f"### Held-out bits per byte: {kind['title']}\n" in text) == (name != "mixed")
    own = result["kinds"]["dsc"]["bits"]["letters"]["letters"]
    assert f"**{own:.3f}**" in text and "### What was found" in text
    log = (whole[0] / "log.jsonl").read_text()
    again = command(base, texts, whole[0], "--markdown", str(page))
    assert again.exit_code == 0, again.output
    assert (whole[0] / "log.jsonl").read_text() == log, "no stage ran again"
    assert json.loads((whole[0] / "results.json").read_text("utf8")) == result
    moved = whole[0].parent / "moved"
    shutil.copytree(whole[0], moved)
    again = command(base, texts, moved, "--kinds", "lora,mixed")
    assert again.exit_code == 0, again.output
    assert (moved / "log.jsonl").read_text() == log, "nor in a folder that has moved"


def test_what_is_measured_is_not_made_again_from_its_records_alone(
    base: Path, texts: list[Path], whole: tuple[Path, Result], result: dict[str, Any]
) -> None:
    records = whole[0].parent / "records"
    for path in [*whole[0].rglob("*.json"), whole[0] / "log.jsonl"]:
        own = path.relative_to(whole[0])
        if len(own.parts) == 1 or own.parts[0] == "matrix" or own.name == "summary.json":
            (records / own).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, records / own)
    log = (records / "log.jsonl").read_text()
    again = command(base, texts, records)
    assert again.exit_code == 0, again.output
    assert (records / "log.jsonl").read_text() == log
    assert json.loads((records / "results.json").read_text("utf8")) == result
    assert not list(records.rglob("*.safetensors"))


def test_texts_are_tokenised_once_for_all_kinds(whole: tuple[Path, Result]) -> None:
    assert [path.parent.name for path in whole[0].rglob("data")] == ["runs"]
    assert {path.name for path in (whole[0] / "data").iterdir()} == set(NAMES)


def test_a_study_that_was_killed_between_and_within_stages_ends_alike(
    base: Path, texts: list[Path], whole: tuple[Path, Result], result: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed within training, which goes on from its checkpoint, and within a matrix, whose rows stay."""
    begun, train = [], AdapterTrainer.run

    def killed(self: AdapterTrainer, until: int | None = None, stop_at: float | None = None) -> Any:
        begun.append(self.step)
        assert train(self, until=2) is None
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterTrainer, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        study(base, texts, tmp_path, "lora").run()
    monkeypatch.setattr(AdapterTrainer, "run", lambda self, **named: (begun.append(self.step), train(self, **named))[1])
    add = Rows.add

    def killed_after_one(self: Rows, adapter: str, *more: Any) -> None:
        add(self, adapter, *more)
        if adapter != "base":
            raise KeyboardInterrupt

    monkeypatch.setattr(Rows, "add", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        study(base, texts, tmp_path, "lora").run()
    assert list(Rows.read(tmp_path / "matrix" / "lora.json").bits) == ["fables"]
    monkeypatch.setattr(Rows, "add", add)
    assert study(base, texts, tmp_path, "lora").run() == []
    assert begun == [0, 2], "training went on from its checkpoint, and was not begun a third time"
    assert Rows.read(tmp_path / "matrix" / "lora.json").bits == result["kinds"]["lora"]["bits"]
    more = study(base, texts, tmp_path, "lora,mixed")
    assert more.run() == [] and Rows.read(tmp_path / "matrix" / "mixed.json").bits == result["kinds"]["mixed"]["bits"]


def test_a_part_that_a_kill_left_behind_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "made.part" / "old").mkdir(parents=True)
    stage = stages.WrittenStage("make", tmp_path / "made", lambda out: (out / "new").mkdir(parents=True))
    assert not stage.done() and stage.run(None) and stage.done()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
    assert not (tmp_path / "made.part").exists()


def test_no_stage_is_begun_that_does_not_fit_the_time(base: Path, texts: list[Path], tmp_path: Path) -> None:
    cut = command(base, texts, tmp_path / "runs", "--kinds", "lora,mixed", "--time-limit", "100s")
    assert cut.exit_code == 0, cut.output
    assert "train lora: needs about 120 s" in cut.output and "4 stages are left; the same command goes on" in cut.output
    found = json.loads((tmp_path / "runs" / "results.json").read_text("utf8"))
    assert found["missing"] == ["train lora", "measure lora", "train mixed", "measure mixed"]
    assert set(found["base_bits"]) == set(NAMES) and found["kinds"] == {}
    assert "**Not finished**: train lora" in (tmp_path / "runs" / "results.md").read_text("utf8")


def test_training_is_cut_at_a_checkpoint_and_goes_on(
    base: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "LEAST_S", 0.0)
    own = study(base, texts, tmp_path, "lora")
    (stage,) = (stage for stage in own.stages() if stage.name == "train lora")
    assert stage.run(time.monotonic() - 1) is False
    assert (tmp_path / "lora" / "state.pt").is_file() and not stage.done()
    assert stage.run(None) and stage.done()
    summary = json.loads((tmp_path / "lora" / "summary.json").read_text())
    assert summary["steps"] == 4, "256 tokens in windows of 32, two a step"


def test_rows_are_measured_as_long_as_they_fit(base: Path, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "lora.json")
    texts = {"one": HeldOutText([[1, 2, 3]], 9)}
    engine = {"dtype": "float32", "threads": 1, "context": 32}
    late = time.monotonic() + 5
    assert measure_rows(rows, base, None, ["base"], texts, engine, 10.0, late) is False and rows.bits == {}
    assert measure_rows(rows, base, None, ["base"], texts, engine, 0.0, None) and set(rows.bits) == {"base"}
    rows.add("slow", {}, 100, 50.0)
    assert expected_seconds([rows.file], 1000) == pytest.approx(1000 * rows.seconds / 102)
    assert expected_seconds([], 1000) == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kinds", "lora,dora"], "--kinds has 'dora'; expected some of lora,lora-xs,shared,dsc,mixed"),
        (["--kinds", "shared"], "shared is made of the LoRAs: name lora, too"),
        (["--kinds", "lora,lora"], "each is named once"),
        (["--set", "steps=5"], "--set steps=5: --tokens gives it"),
        (["--set", "lora.length=8"], "kinds are compared at one length"),
        (["--set", "dora.rate=1"], "'dora' is no kind"),
        (["--set", "speed=1"], "'speed' is no setting of any kind"),
        (["--set", "length=100"], "length is 100; the base's context is 64"),
        (["--basis", "13"], "--basis is 13; 3 LoRAs of rank 4 have 12 directions"),
        (["--picks", "41"], "--picks is 41, of --atoms 40"),
        (["--layers", "7"], "layers is '7'"),
        (["--time-limit", "soon"], "time limit 'soon'"),
    ],
)
def test_what_cannot_be_meant_is_named(
    base: Path, texts: list[Path], tmp_path: Path, words: list[str], said: str
) -> None:
    result = command(base, texts, tmp_path / "runs", *words)
    assert result.exit_code == 1 and said in result.output, result.output
    assert not (tmp_path / "runs" / "log.jsonl").exists()


def test_texts_that_make_no_study_are_named(base: Path, texts: list[Path], tmp_path: Path) -> None:
    words = ["adapter", "study", "--base", str(base), "--out", str(tmp_path / "runs")]
    none = CliRunner().invoke(main, words)
    assert none.exit_code == 1 and "no text given" in none.output
    nowhere = CliRunner().invoke(main, [*words, "--text", str(tmp_path / "nowhere")])
    assert nowhere.exit_code == 1 and "nowhere: no such file or folder" in nowhere.output
    one = CliRunner().invoke(main, [*words, "--text", str(texts[0]), "--set", "length=32"])
    assert one.exit_code == 1 and "1 text is given; a study of tenants compares at least 2" in one.output
    short = tmp_path / "short.txt"
    short.write_text("A word.\n\nAnother word.\n\nA third one.", "utf8")
    two = [*words, "--text", str(texts[0]), "--text", str(short), "--set", "length=32", "--basis", "4"]
    told = CliRunner().invoke(main, two)
    assert told.exit_code == 1 and "short: has" in told.output and "windows of 32 need more" in told.output
    taken = tmp_path / "mixed.txt"
    taken.write_bytes(texts[0].read_bytes())
    named = CliRunner().invoke(main, [*words, "--text", str(taken), "--text", str(texts[1]), "--set", "length=32"])
    assert "a text is called 'mixed'" in named.output


def test_a_base_that_cannot_be_adapted_is_named_before_anything_is_trained(
    texts: list[Path], golden_folder: Any, tmp_path: Path
) -> None:
    result = command(golden_folder("dsc"), texts, tmp_path / "runs", "--set", "length=8")
    assert result.exit_code == 1 and "ffn.kind is 'dsc'; adapters are trained of: 'dense'" in result.output


def test_another_study_is_not_mixed_in(base: Path, texts: list[Path], whole: tuple[Path, Result]) -> None:
    result = command(base, texts, whole[0], "--tokens", "512")
    assert result.exit_code == 1 and "holds a run with other settings" in result.output


def test_settings_go_to_the_kinds_that_have_them() -> None:
    changes = ("rate=0.1", "gamma=0.2", "lora.warmup=3")
    assert changes_of(changes, "lora") == ["rate=0.1", "warmup=3"]
    assert changes_of(changes, "dsc") == ["rate=0.1", "gamma=0.2"]
    options = StudyOptions(tokens=1000, rank=8, changes=("length=100", "mixed.rows=2"))
    assert [run_settings(options, kind).steps for kind in ("lora", "mixed", "dsc")] == [3, 5, 10]
    assert run_settings(options, "lora", EqualLora(1, ("q",))).model_dump()["alpha"] == 2.0
    with pytest.raises(ConfigError, match="twice the rank"):
        changes_of(("lora.alpha=3",), "lora")
