"""`dsc-serve quantize`: on the embedded model, which was trained in full precision, and on small ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_serve import LLM
from dsc_serve.cli import main
from dsc_serve.config import resolve_model
from dsc_serve.model.checkpoint import load_model, open_source, save_checkpoint
from dsc_serve.model.folder import load_tensors, weight_files
from dsc_serve.model.rounding import rounded
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.train.evaluation import evaluate
from dsc_serve.train.quantise.command import finite
from dsc_serve.train.quantise.compensation import compensated, spectral_norm
from dsc_serve.train.quantise.conversion import Conversion, convert
from dsc_serve.train.quantise.feedback import rounded_with_feedback
from dsc_serve.train.quantise.measure import layer_costs, others, picks
from dsc_serve.train.quantise.walk import Products, Walk, plainly

CPU = torch.device("cpu")
TINY = "dsc-tiny"
MEASURED = 6_000  # characters …
MUCH = 60_000  # … and where ways are told apart whose costs are tenths of a percent
DOCS = Path(__file__).parents[2] / "docs"


def prose(names: tuple[str, ...]) -> str:
    """Paragraphs of this repository's pages, which no model here was trained on."""
    blocks = [block for name in names for block in (DOCS / name).read_text("utf8").split("\n\n")]
    return "\n\n".join(block for block in blocks if block[:1].isalpha() and "|" not in block)


HELD_OUT = ("reliability.md", "speculation.md", "batching.md", "security.md", "scale.md", "operations.md")
CALIBRATION = ("engine.md", "kernels.md", "training.md", "study.md", "benchmarks.md", "tokenizers.md", "tools.md")


def bits(model: str, measured: int = MEASURED, **settings: Any) -> float:
    """Per byte of so much of the held-out text."""
    with LLM(model, **settings) as llm:
        return float(evaluate(llm, prose(HELD_OUT)[:measured]).to_dict()["bits_per_byte"])


@pytest.fixture(scope="module")
def calibration() -> list[int]:
    tokenizer = Tokenizer.load(resolve_model(TINY))
    assert tokenizer is not None
    return tokenizer.encode(prose(CALIBRATION), add_special_tokens=False)


@pytest.fixture(scope="module")
def full() -> float:
    return bits(TINY)


@pytest.fixture(scope="module")
def converted(calibration: list[int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model in 4 bits: to nearest, calibrated, and calibrated with a compensation of rank 32."""
    root = tmp_path_factory.mktemp("quantised")
    ways: dict[str, tuple[list[int], int]] = {
        "nearest": ([], 0),
        "calibrated": (calibration, 0),
        "compensated": (calibration, 32),
    }
    for name, (ids, rank) in ways.items():
        convert(resolve_model(TINY), root / name, "int4", "", ids, rank, 2048)
    return {name: root / name for name in ways}


@pytest.mark.timeout(900)
def test_eight_bits_cost_less_than_a_third_of_a_percent(full: float) -> None:
    assert abs(bits(TINY, weights="int8") / full - 1) < 0.003


@pytest.mark.full
@pytest.mark.timeout(900)
def test_four_bits_cost_less_where_more_is_done(converted: dict[str, Path]) -> None:
    full = bits(TINY, MUCH)
    cost = {name: bits(str(folder), MUCH) / full - 1 for name, folder in converted.items()}
    assert cost["nearest"] < 0.05
    assert cost["calibrated"] < min(0.02, cost["nearest"])
    assert cost["compensated"] < min(0.02, cost["nearest"])
    assert abs(bits(TINY, MUCH, weights="int4") / full - 1 - cost["nearest"]) < 1e-3  # at load the same is done


def test_a_router_in_eight_bits_keeps_the_picks(calibration: list[int], tmp_path: Path) -> None:
    """Of the same inputs, and of those that layers before it have changed."""
    convert(resolve_model(TINY), tmp_path / "m", "int8", "embedding,attention,mlp,bank", [], 0, 0)
    windows = [torch.tensor(calibration[:512])]
    with plainly():
        found = []
        for path in (resolve_model(TINY), tmp_path / "m"):
            source = open_source(path)
            walk = Walk(source.config, source.weights())
            found.append(picks(walk, [walk.layer(i) for i in range(6)], windows))
    changed = [others(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None]
    assert len(changed) == 6
    assert max(changed) < 0.02, changed


def test_costs_are_told_by_layer(converted: dict[str, Path], calibration: list[int]) -> None:
    costs = layer_costs(resolve_model(TINY), converted["nearest"], [torch.tensor(calibration[:256])])
    assert len(costs) == 6
    assert all(-0.02 < cost.loss < 0.05 for cost in costs) and any(cost.loss > 0 for cost in costs)
    assert all(cost.picks is not None and 0 < cost.picks < 0.5 for cost in costs)


# --- the methods


def inputs(columns: int = 96, tokens: int = 400) -> Tensor:
    """Correlated ones, some of which hardly vary."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0.5, -2, columns)
    return torch.randn(tokens, columns, generator=generator) @ mixing


def weight(rows: int = 48, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bits_", [4, 8])
def test_feedback_lowers_the_error_of_outputs(bits_: int) -> None:
    x, w = inputs(), weight()
    nearest, fed = rounded(w, bits_), rounded_with_feedback(w, x.T @ x, bits_)  # type: ignore[arg-type]
    errors = [float((x @ (w - own.whole()).T).norm()) for own in (nearest, fed)]
    assert errors[1] < 0.8 * errors[0]


def test_feedback_without_any_input_is_rounding_to_nearest() -> None:
    own = rounded_with_feedback(weight(), torch.zeros(96, 96), 4)
    assert torch.equal(own.whole(), rounded(weight(), 4).whole())


def test_compensation_lowers_the_error_of_outputs_as_its_rank_grows() -> None:
    x, w = inputs(), weight()
    base = rounded(w, 4)
    errors = [float((x @ (w - base.whole()).T).norm())]
    for rank in (4, 16, 48):
        own = compensated(w, base, x.T @ x, rank)
        assert own.rank == rank
        errors.append(float((x @ (w - own.whole()).T).norm()))
        blind = compensated(w, base, None, rank)
        assert spectral_norm(w - blind.whole()) < spectral_norm(w - base.whole())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_the_norm_of_a_large_matrix_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = spectral_norm(weight())
    monkeypatch.setattr("dsc_serve.train.quantise.compensation.EXACT", 4)
    assert 0.99 * exact < spectral_norm(weight()) <= 1.001 * exact


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_every_kind_is_calibrated_and_served(kind: str, tmp_path: Path) -> None:
    model = small_config(kind)
    save_checkpoint(model, wide_tensors(model), tmp_path / "m")
    ids = [(37 * i * i + 11 * i) % 61 for i in range(900)]
    done = convert(tmp_path / "m", tmp_path / "out", "int4", "", ids, 2, 900)
    assert all(0 < own.error < 0.5 for own in done.matrices)
    check_norms(done, tmp_path / "out")
    mlp = [own for own in done.matrices if own.name.endswith("down_proj.weight")]
    assert mlp and all("compensated with rank 2" in own.form for own in mlp)
    found = load_model(tmp_path / "out", "float32", CPU)
    assert any("rank" in form for form in found.held)
    with LLM(str(tmp_path / "m"), dtype="float32") as before, LLM(str(tmp_path / "out"), dtype="float32") as after:
        want, got = (llm.logits([ids[:40]])[0] for llm in (before, after))
    assert float((got - want).norm() / want.norm()) < 0.5
    source = open_source(tmp_path / "out")  # what the rounded values give, inputs not rounded
    save_checkpoint(source.config, dict(source.weights()), tmp_path / "wide")
    with (
        LLM(str(tmp_path / "wide"), dtype="float32") as wide,
        LLM(str(tmp_path / "out"), dtype="float32", weights="bfloat16") as plain,
    ):
        want, got = (llm.logits([ids[:40]])[0] for llm in (wide, plain))
    assert float((got - want).norm() / want.norm()) < 1e-5


def check_norms(done: Conversion, out: Path) -> None:
    """What is told of each matrix is what float64 finds in the folders that were read and written."""
    before, after = done.source.weights(), open_source(out).weights()
    told = 0
    for own in done.matrices:
        wide, rounded_ = (weights[own.name].double().flatten(0, -2) for weights in (before, after))
        if "atoms_" in own.name or "router" in own.name:  # which are projected, or have a norm folded in, before
            continue
        assert own.norm is not None and own.residual is not None and not own.estimated
        assert own.norm == pytest.approx(float(torch.linalg.matrix_norm(wide, ord=2)), rel=1e-5)
        assert own.residual == pytest.approx(float(torch.linalg.matrix_norm(wide - rounded_, ord=2)), rel=1e-3)
        told += 1
    assert told > 4


def test_routers_stay_in_the_dtype_that_they_are_stored_in(tmp_path: Path) -> None:
    """Families keep them in float32 beside bfloat16: rounding them to it would change picks."""
    model = small_config("moe")
    tensors = {name: own if "router" in name else own.bfloat16() for name, own in wide_tensors(model).items()}
    save_checkpoint(model, tensors, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", "int8", "attention=bfloat16", [], 0, 0)
    found = load_tensors(weight_files(tmp_path / "out"))
    routers = [name for name in tensors if name.endswith("router.weight")]
    assert len(routers) == 2
    for name in routers:
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensors[name])
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_every_product_is_heard_with_its_name(tmp_path: Path) -> None:
    model = small_config("moe")
    save_checkpoint(model, wide_tensors(model), tmp_path / "m")
    source = open_source(tmp_path / "m")
    with plainly():
        walk = Walk(source.config, dict(source.weights()))
        layer = walk.layer(0)
        names = {own.data_ptr(): name for name, own in walk.tensors.items()}
        with Products(names) as products:
            walk.run(layer, walk.embedded([torch.arange(40)]))
    experts = [name for name in products.squares if ".experts." in name]
    assert len(experts) > 4
    assert all(
        own.shape == (model.layers[0].ffn.expert_size,) * 2 for name, own in products.squares.items() if "down" in name
    )  # type: ignore[union-attr]


# --- the command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


@pytest.mark.timeout(900)
def test_the_command_reports_what_it_did(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(CALIBRATION)[:30_000])
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = ("--calibration", text, "--tokens", "1024", "--compensate", "4", "--json", report)
    done = run(TINY, "--weights", "int4", "--out", out, *options)
    assert done.exit_code == 0, done.output
    assert "bits/byte" in done.output and "layer 5:" in done.output and "of picks" in done.output
    found = json.loads(report.read_text(), parse_constant=pytest.fail)
    norms = {own["name"]: (own["residual"], own["norm"], own["estimated"]) for own in found["matrices"]}
    assert norms.pop("model.embed_tokens.weight") == (None, None, False)
    assert all(0 < residual < norm and not estimated for residual, norm, estimated in norms.values())
    assert len(found["layers"]) == 6 and found["bits_per_byte"][1] > 0
    assert {own["form"].split()[0] for own in found["matrices"]} == {"int4", "int8"}
    assert (out / "tokenizer.json").is_file()
    again = run(TINY, "--weights", "int4", "--out", out)
    assert again.exit_code == 1 and "holds a checkpoint already" in again.output


def test_norms_that_are_estimated_are_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.train.quantise.compensation.EXACT", 33)
    model = small_config("dense", num_hidden_layers=1)
    save_checkpoint(model, wide_tensors(model), tmp_path / "m")
    done = run(tmp_path / "m", "--weights", "int8", "--out", tmp_path / "o", "--json", tmp_path / "r")
    assert done.exit_code == 0 and "from below" not in done.output
    monkeypatch.setattr("dsc_serve.train.quantise.compensation.EXACT", 31)
    done = run(tmp_path / "m", "--weights", "int8", "--out", tmp_path / "p", "--json", tmp_path / "s")
    assert done.exit_code == 0 and done.output.count(", from below (int8") == 7
    reports = [json.loads((tmp_path / name).read_text())["matrices"] for name in "rs"]
    assert [{own["estimated"] for own in matrices} for matrices in reports] == [{False}, {True}]


def test_numbers_that_are_not_finite_are_null_in_a_report() -> None:
    report = {"change": math.nan, "layers": [{"loss": math.inf, "picks": 0.5}], "bits_per_byte": [-math.inf, 1]}
    assert finite(report) == {"change": None, "layers": [{"loss": None, "picks": 0.5}], "bits_per_byte": [None, 1]}


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    assert "int3" in run(TINY, "--weights", "int3", "--out", tmp_path / "o").output
    wrong = run(TINY, "--weights", "int8", "--keep", "router=int4", "--out", tmp_path / "o")
    assert wrong.exit_code == 1 and "router cannot be int4" in wrong.output
    save_checkpoint(small_config("moe"), wide_tensors(small_config("moe")), tmp_path / "m")
    normed = run(tmp_path / "m", "--weights", "int8", "--keep", "router=int8", "--out", tmp_path / "o")
    assert normed.exit_code == 1 and "leave router out here" in normed.output
    (tmp_path / "short.txt").write_text("a")
    short = run(TINY, "--weights", "int8", "--calibration", tmp_path / "short.txt", "--out", tmp_path / "o")
    assert short.exit_code == 1 and "calibration needs at least 2" in short.output
    assert not (tmp_path / "o").exists()


@pytest.mark.timeout(900)
def test_keys_and_values_in_eight_bits_cost_little(full: float) -> None:
    assert abs(bits(TINY, kv_dtype="int8") / full - 1) < 0.003
