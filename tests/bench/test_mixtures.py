"""Mixtures of real shapes against the two DSCs that each can be compared with."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from dsc_kernels import native
from dsc_serve.bench.compare import comparison
from dsc_serve.bench.compare.command import compare_command
from dsc_serve.bench.compare.comparison import GROUPS, Comparison, ComparisonError, load_comparison, members
from dsc_serve.bench.compare.report import markdown
from dsc_serve.bench.compare.results import load_results
from dsc_serve.bench.layer import beside, command, measurement, systems
from dsc_serve.bench.layer.command import layer_command
from dsc_serve.bench.load.made_up_tokenizer import save_tokenizer
from dsc_serve.bench.step.kept import load_kept, markdown_of_kept
from dsc_serve.cli import main
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.model.initial import initial_tensors, preset_config
from dsc_serve.model.mixtures import MIXTURES, equal_dsc

WIDTHS = {"olmoe": (64, 8), "granite": (32, 8), "qwen": (60, 4)}
COMPARISON = """
title = "A small mixture"
subject = "dsc equal total"
baseline = "moe"
sizes = true
streams = [1]
waves = 1
rounds = 1
prompt_tokens = 5
output_tokens = 4
vocab_size = 90
"""
SYSTEM = '[[system]]\nname = "{name}"\nfolder = "{folder}"\n'


@pytest.mark.parametrize("name", MIXTURES)
def test_one_dsc_is_equal_in_total_and_one_in_active_parameters(name: str) -> None:
    moe, by_total, by_active = (
        preset_config(name, kind, equal=equal) for kind, equal in (("moe", None), ("dsc", "total"), ("dsc", "active"))
    )
    assert isinstance(moe.ffn, MoeConfig) and (moe.ffn.num_experts, moe.ffn.experts_per_token) == WIDTHS[name]
    (total, active), (total1, active1), (total2, active2) = map(parameter_counts, (moe, by_total, by_active))
    assert 6e8 < total < 8e8
    assert (total1, active2) == (pytest.approx(total, rel=1e-3), pytest.approx(active, rel=1e-3))
    assert active1 > 1.1 * active and total2 < 0.9 * total
    assert {config.model_copy(update={"ffn": moe.ffn}) == moe for config in (by_total, by_active)} == {True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "olmoe", "--ffn", "dsc"], "equal is None; with preset 'olmoe' it must be one of total, active"),
        (["--preset", "olmoe", "--ffn", "moe", "--equal", "total"], "equal is 'total'; with preset 'olmoe' it must be"),
        (["--preset", "qwen", "--ffn", "dense"], "preset 'qwen' has no ffn 'dense'; it has 'moe' and 'dsc'"),
        (
            ["--preset", "paper", "--ffn", "dsc", "--equal", "total"],
            "equal is 'total'; preset 'paper' is equal in",
        ),
    ],
)
def test_a_preset_that_has_no_such_ffn_says_which_it_has(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["init", *options, "--out", str(tmp_path / "m")])
    assert done.exit_code != 0 and message in done.output
    assert not (tmp_path / "m").exists()


def test_mixture_is_a_comparison_for_each_shape() -> None:
    assert members("mixture") == GROUPS["mixture"] and members("paper") == ("paper",)
    for name, shape in zip(members("mixture"), MIXTURES, strict=True):
        found = load_comparison(name)
        assert (found.preset, found.streams, found.sizes) == (shape, (1, 8, 16, 32), True)
        assert [(system.ffn, system.equal) for system in found.system] == [
            ("dsc", "total"),
            ("dsc", "active"),
            ("dsc", "total"),
            ("dsc", "active"),
            ("moe", None),
        ]


@pytest.mark.parametrize(
    ("preset", "system", "message"),
    [
        ("olmoe", {"ffn": "dsc"}, "equal is None; it must be total or active for ffn 'dsc' at a preset of olmoe"),
        ("paper", {"ffn": "dsc", "equal": "total"}, "equal is 'total'; it must be total or active for ffn 'dsc' at"),
        ("olmoe", {"ffn": "moe", "equal": "total"}, "equal is 'total'; it must be total or active for ffn 'dsc' at"),
        ("granite", {"ffn": "dense"}, "system 'a' must be moe or dsc, which preset 'granite' has"),
    ],
)
def test_a_system_that_a_preset_does_not_have_is_named(preset: str, system: dict[str, str], message: str) -> None:
    content = {"title": "t", "subject": "a", "baseline": "a", "preset": preset, "system": [{"name": "a", **system}]}
    with pytest.raises((ComparisonError, msgspec.ValidationError), match=message):
        msgspec.convert(content, Comparison)


def small(name: str) -> ModelConfig:
    """A mixture's shape with its routing, but narrow."""
    config = MIXTURES[name]
    assert isinstance(config.ffn, MoeConfig)
    shared = config.ffn.shared_expert and config.ffn.shared_expert.model_copy(update={"size": 24})
    ffn = config.ffn.model_copy(update={"expert_size": 16, "shared_expert": shared})
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return config.model_copy(update={**sizes, **heads, "max_position_embeddings": 256, "ffn": ffn})


@pytest.mark.full
@pytest.mark.timeout(400)  # six processes load torch, one after another
def test_a_mixture_and_its_two_dscs_are_measured_with_their_sizes_in_every_table(tmp_path: Path) -> None:
    moe = small("qwen")
    configs = {"moe": moe} | {
        f"dsc equal {equal}": moe.model_copy(update={"ffn": equal_dsc(moe, equal)}) for equal in ("total", "active")
    }
    text = COMPARISON
    for system, config in configs.items():
        folder = tmp_path / system.replace(" ", "-")
        save_checkpoint(config, dict(initial_tensors(config, 0, torch.float32)), folder)
        save_tokenizer(config.vocab_size, folder)
        text += SYSTEM.format(name=system, folder=folder)
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    done = CliRunner().invoke(compare_command, [str(tmp_path / "own.toml"), "--out", str(out), "--alone"])
    assert done.exit_code == 0, done.output
    results = load_results(out / "results.json")
    assert results.measured() == ["moe", "dsc equal total", "dsc equal active"]
    assert all(row.figures["failed"] == 0 for row in results.rows)
    assert all(isinstance(configs[system].ffn, DscConfig) for system in configs if system != "moe")
    page = markdown(results, "plots", ())
    labels = [results.label(system) for system in configs]
    assert all(" M active)" in label for label in labels)
    for table in (part for part in page.split("\n\n") if part.startswith("|") or ":\n\n|" in part):
        assert any(label in table for label in labels), table


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.full] * bool(i)) for i, one in enumerate(MIXTURES)]
)
def test_the_layers_of_a_mixture_are_right_and_have_their_share_of_the_roofline(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(MIXTURES, name, small(name))
    monkeypatch.setattr(measurement, "RATE_SECONDS", 0.01)
    monkeypatch.setattr(measurement, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(beside, "PAPER", "tiny")
    options = ["--config", name, "--repeats", "2", "--layers", "2", "--seconds", "1", "--threads", "1"]
    out = tmp_path / "layer.json"
    done = CliRunner().invoke(layer_command, [*options, "--batches", "3", "--dtype", "float32", "--json", str(out)])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    tables = markdown_of_kept(load_kept(out))
    assert done.stdout[done.stdout.index("share of the roofline of the native") :].strip() in tables, "as printed"
    rows = {(row["system"], row["path"], row["batch"]): row for row in written["rows"]}
    paths = {"moe": {"native", "plain", "sorted"}, "dsc": {"native", "native int8", "plain"}}
    present = {(kind, path) for kind, own in paths.items() for path in own if native.active() or "native" not in path}
    assert rows.keys() == {(*name, batch) for name in present for batch in (3,)}
    assert all(row["wrong"] is None and row["us"] > 0 and row["roofline_share"] > 0 for row in rows.values())
    experts, picked = WIDTHS[name]
    assert f"{experts} experts of 16, top {picked}" in done.output
    (share,) = written["beside"]["shares"]
    assert share["batch"] == 3 and f"{name} / paper" in done.stdout
    assert {(row["system"], row["path"]) for row in written["beside"]["paper"]["rows"]} <= {("moe", "native")}
    if native.active():
        assert share["share"] == rows["moe", "native", 3]["roofline_share"]
        assert share["paper"] == written["beside"]["paper"]["rows"][0]["roofline_share"]
        assert share["ratio"] == pytest.approx(share["share"] / share["paper"])
        assert done.stdout.rstrip().endswith(f"{share['ratio']:.2f}")


def test_the_configs_of_the_layer_benchmark_are_known() -> None:
    assert systems.CONFIGS == command.CONFIGS and command.MIXTURES == tuple(MIXTURES) == comparison.MIXTURES
    done = CliRunner().invoke(layer_command, ["--config", "qwen", "--sweep", "atoms"])
    assert done.exit_code == 1 and "--config qwen is a mixture" in done.output
