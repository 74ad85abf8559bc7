"""The commands, as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from support.small_models import DATA

from dsc_serve.cli import main
from dsc_serve.config import resolve_model
from dsc_serve.model.config import DscConfig, load_config
from dsc_serve.model.decoder import parameter_counts


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "serve",
        "generate",
        "inspect",
        "init",
        "import-reference",
        "bench",
        "bench serve",
        "bench overload",
        "settings",
        "key",
        "bench layer",
        "kernels",
        "kernels aot",
        "kernels steps",
        "train",
        "evaluate",
        "prune",
        "study",
    ],
)
def test_help_says_what_every_option_does(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_inspect_describes_the_embedded_model() -> None:
    result = run("inspect")
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    config = load_config(resolve_model("dsc-tiny"))
    assert isinstance(config.ffn, DscConfig)
    total, active = parameter_counts(config)
    assert rows["parameters"].startswith(f"{total:,} in all, {active:,} active")
    assert rows["ffn"].startswith(f"dsc (algorithm 2), {config.ffn.atoms_per_token} of {config.ffn.num_atoms} atoms")
    assert f"[{config.ffn.num_atoms}, {config.hidden_size}]" in rows["bank"]
    assert "max |γ|" in rows["certificate"]
    assert {"kernels", "tokenizer", "architecture", "dtype"} <= rows.keys()


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "fp32", "float32"])
def test_a_dtype_goes_by_its_short_and_its_long_name(dtype: str) -> None:
    result = run("inspect", "--dtype", dtype)
    assert {"b": "bfloat16", "f": "float32"}[dtype[0]] in result.output


def test_generate_continues_the_prompt_and_repeats_with_a_seed() -> None:
    texts = [run("generate", "In the beginning", "--max-tokens", "12", "--seed", "4").stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("In the beginning") and len(texts[0]) > 30


def test_generate_takes_token_ids_where_there_is_no_tokenizer(golden_folder: Callable[[str], Path]) -> None:
    model = str(golden_folder("dsc"))
    result = run("generate", "1, 2 3", "--model", model, "--temperature", "0", "--max-tokens", "4")
    assert result.output.split() == ["92", "92", "125", "125"]
    failed = run("generate", "hello", "--model", model)
    assert failed.exit_code == 1
    assert "has no tokenizer: give token ids" in failed.output


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_init_makes_a_model_that_serves(kind: str, tmp_path: Path) -> None:
    out = str(tmp_path / kind)
    sizes = [
        "vocab_size=100",
        "hidden_size=64",
        "num_hidden_layers=1",
        "num_attention_heads=2",
        "num_key_value_heads=1",
    ]
    sets = [part for size in [*sizes, "head_dim=32"] for part in ("--set", size)]
    result = run("init", "--ffn", kind, "--out", out, "--context", "40", *sets)
    assert result.exit_code == 0, result.output
    assert f"{kind}, " in result.output
    assert kind in run("inspect", out).output
    generated = run("generate", "5", "--model", out, "--max-tokens", "3")
    assert len(generated.output.split()) == 3


def test_balanced_models_differ_in_their_routers_alone(tmp_path: Path) -> None:
    sizes = ["vocab_size=100", "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "head_dim=16"]
    sets = [part for size in [*sizes, "num_key_value_heads=2"] for part in ("--set", size)]
    written = {}
    for name, more in (("random", []), ("balanced", ["--balanced"])):
        result = run("init", "--ffn", "moe", "--out", str(tmp_path / name), "--context", "40", *sets, *more)
        assert result.exit_code == 0, result.output
        written[name] = load_file(tmp_path / name / "model.safetensors")
    other = {key for key, tensor in written["random"].items() if not torch.equal(tensor, written["balanced"][key])}
    assert other == {f"model.layers.{i}.mlp.router.weight" for i in range(2)}


def test_import_reference_writes_a_checkpoint(tmp_path: Path) -> None:
    files = ["--weights", str(DATA / "dense.weights.safetensors"), "--config", str(DATA / "dense.config.json")]
    result = run("import-reference", *files, "--out", str(tmp_path / "out"))
    assert "dense, 2 layers of width 48" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere"], "neither a folder, a file nor an embedded model; embedded: dsc-tiny"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0; it must be 0 (greedy) or above"),
        (["generate", "x", "--step-tokens", "8"], "step_tokens is 8 but max_running is 64"),
        (["init", "--ffn", "dsc", "--out", "x", "--set", "hiden_size=3"], "--set hiden_size=3"),
        (
            ["init", "--ffn", "dense", "--out", "x", "--balanced"],
            "--balanced: --ffn dense has no router; expected one of",
        ),
        (["serve", "nowhere"], "neither a folder, a file nor an embedded model"),
    ],
)
def test_mistakes_are_one_line_without_a_trace(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command",
    [
        "bench layer --json",
        "bench layer --plot",
        "bench batching --json",
        "bench engine --json",
        "bench scheduler --json",
        "bench speculation --json",
        "bench serve http://127.0.0.1:1 --records",
        "bench compare quick --out x --ratios",
        "evaluate --text README.md --json",
        "study --out x --markdown",
    ],
)
def test_a_result_without_a_folder_to_go_to_is_refused_before_the_work(command: str, tmp_path: Path) -> None:
    result = run(*command.split(), str(tmp_path / "missing" / "file"))
    assert result.exit_code == 2
    assert "file: its folder does not exist" in " ".join(result.output.split())
