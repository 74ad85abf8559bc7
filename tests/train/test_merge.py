"""Experts that say alike become one: which, of what, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.small_models import small_config, wide_tensors

from dsc_serve import LLM, SamplingParams
from dsc_serve.cli import main
from dsc_serve.model.checkpoint import load_tensors, save_checkpoint, weight_files
from dsc_serve.model.config import MoeConfig, load_config
from dsc_serve.train.corpus import prepare
from dsc_serve.train.merge import clustered, in_subspace, merge_experts, similarities
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import DataSettings, TrainError

PAIRS = [[0, 5], [1, 4], [2, 3]]
SHARED = {"shared_expert": {"size": 9}, "experts_per_token": 2, "num_experts": 6}


def tokenizer_files(tmp_path: Path, out: Path) -> None:
    (tmp_path / "text.txt").write_text(paragraphs(40))
    corpus = prepare([tmp_path / "text.txt"], DataSettings(), 300, tmp_path / "data")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((corpus.folder / name).read_bytes())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Mixtures, behind a dense layer, whose experts are three pairs that nearly agree."""
    kinds = {"layer_kinds": [{"ffn": {"kind": "dense", "size": 28}}, {}], "layer_pattern": [0, 1, 1]}
    config = small_config("moe", SHARED, vocab_size=300, mlp_gated=True, num_hidden_layers=3, **kinds)
    tensors = wide_tensors(config)
    for layer in (1, 2):
        for first, second in PAIRS:
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{{}}.{part}.weight"
                noise = torch.randn(tensors[name.format(first)].shape, generator=torch.Generator().manual_seed(second))
                tensors[name.format(second)] = tensors[name.format(first)] + 1e-3 * noise
    out = tmp_path / "model"
    save_checkpoint(config, tensors, out)
    tokenizer_files(tmp_path, out)
    return out


def test_experts_that_nearly_agree_become_what_they_are(model: Path, tmp_path: Path) -> None:
    text = paragraphs(10)
    found = merge_experts(model, 3, text, {"text": text}, tmp_path / "out")
    assert [(own.layer, own.clusters) for own in found.layers] == [(1, PAIRS), (2, PAIRS)]
    config = load_config(tmp_path / "out")
    sizes = [layer.ffn.num_experts for layer in config.layers if isinstance(layer.ffn, MoeConfig)]
    assert sizes == [3, 3] and config.layers[0].ffn.kind == "dense"
    old, new = (load_tensors(weight_files(folder)) for folder in (model, tmp_path / "out"))
    for at, (first, _) in enumerate(PAIRS):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{{}}.{part}.weight"
            want = old[name.format(first)]
            assert (new[name.format(at)] - want).norm() < 0.04 * want.norm()
    assert torch.equal(
        new["model.layers.2.mlp.shared_expert.up_proj.weight"], old["model.layers.2.mlp.shared_expert.up_proj.weight"]
    )
    with LLM(str(tmp_path / "out"), dtype="float32") as llm:
        (output,) = llm.generate(["the"], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(output.token_ids) == 3


def test_the_losses_are_those_of_the_model_that_is_written(model: Path, tmp_path: Path) -> None:
    from dsc_serve.train.evaluation import evaluate

    text = paragraphs(6)
    found = merge_experts(model, 4, text, {"text": text}, tmp_path / "out")
    for folder, told in ((model, found.before), (tmp_path / "out", found.after)):
        with LLM(str(folder), dtype="float32") as llm:
            assert evaluate(llm, text).loss == pytest.approx(told["text"].loss, abs=1e-5)
    assert found.dropped["text"].loss != found.after["text"].loss


def test_a_quantised_folder_is_merged_by_the_values_of_its_weights(model: Path, tmp_path: Path) -> None:
    from dsc_serve.train.evaluation import evaluate
    from dsc_serve.train.quantise.conversion import convert

    convert(model, tmp_path / "eight", "int8", "", [], 0, 0)
    text = paragraphs(6)
    found = merge_experts(tmp_path / "eight", 3, text, {"text": text}, tmp_path / "out")
    assert [(own.layer, own.clusters) for own in found.layers] == [(1, PAIRS), (2, PAIRS)]
    assert not load_config(tmp_path / "out").quantised
    for folder, told in ((tmp_path / "eight", found.before), (tmp_path / "out", found.after)):
        with LLM(str(folder), dtype="float32", weights="bfloat16") as llm:
            assert evaluate(llm, text).loss == pytest.approx(told["text"].loss, abs=1e-6)


def test_clusters_join_those_that_are_most_alike() -> None:
    outputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.1]])]
    similar = similarities(outputs)
    assert similar[0, 2] > 0.99 > 0.1 > similar[0, 1]
    assert clustered(similar, 2) == [[0, 2], [1]]
    assert clustered(similar, 3) == [[0], [1], [2]]
    assert clustered(similar, 1) == [[0, 1, 2]]


def test_a_merged_matrix_is_the_mean_by_weight_without_what_is_weak() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(12, 3, generator=generator)
    parts = [shared @ torch.randn(3, 8, generator=generator) for _ in range(2)]
    noisy = [part + 1e-4 * torch.randn(12, 8, generator=generator) for part in parts]
    merged = in_subspace(noisy, torch.tensor([0.25, 0.75]))
    assert torch.linalg.matrix_rank(merged, rtol=1e-5) == 3
    torch.testing.assert_close(merged, 0.25 * parts[0] + 0.75 * parts[1], atol=2e-3, rtol=0)


def test_what_cannot_be_merged_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    for experts in (1, 6):
        with pytest.raises(TrainError, match=f"experts is {experts}; allowed: 2, what a token picks, to 5"):
            merge_experts(model, experts, "text", {"text": "text"}, tmp_path / "out")
    for kind, ffn, message in (
        ("dense", {}, "none of its FFNs is a mixture"),
        ("moe", {"num_experts": 6, "groups": 2}, "picked by 2 groups"),
    ):
        config = small_config(kind, ffn)
        save_checkpoint(config, wide_tensors(config), tmp_path / message)
        with pytest.raises(TrainError, match=message):
            merge_experts(tmp_path / message, 3, "text", {"text": "text"}, tmp_path / "out")


def test_merging_on_the_command_line(model: Path, tmp_path: Path) -> None:
    arguments = [
        str(model),
        "--experts",
        "3",
        "--calibration",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(main, ["merge-experts", *arguments])
    assert result.exit_code == 0, result.output
    assert "layer 1: experts 0 + 5; 1 + 4; 2 + 3 merged, alone" in result.output
    assert "3 of 6 experts per layer" in result.output
    assert "with the least picked dropped instead" in result.output
