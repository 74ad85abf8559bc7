from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.native import RouterPrecision
from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.step import forward
from dsc_serve.bench.step.forward import Forward, ForwardBench, build, run_forward, whole_batch
from dsc_serve.bench.step.forward_command import forward_command
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import dsc_layers
from dsc_serve.model.initial import initial_tensors, preset_config

SMALL = ForwardBench(sequences=2, length=20, repeats=2, threads=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str, kind: str) -> ModelConfig:
        return preset_config(name, kind).model_copy(update={"vocab_size": 128, "num_hidden_layers": 2})

    monkeypatch.setattr(forward, "preset_config", config)


def test_a_forward_is_that_of_each_sequence_alone() -> None:
    config = forward.preset_config("paper", "moe")
    model = build("moe", SMALL, None, dict(initial_tensors(config, 0, torch.bfloat16)))
    batch = whole_batch(config, SMALL)
    with torch.inference_mode():
        both = Forward(model, batch)()
        assert both.shape == (40, 128) and both.dtype == torch.bfloat16
        first = whole_batch(config, ForwardBench(sequences=1, length=20))
        assert torch.equal(first.token_ids, batch.token_ids[:20])
        alone = Forward(model, first)().float()
    assert float((both[:20].float() - alone).norm() / alone.norm()) < 0.02


def test_every_system_gets_a_time_and_is_compared_with_our_moe(tmp_path: Path) -> None:
    document, file = tmp_path / "benchmarks.md", tmp_path / "forward.json"
    document.write_text("<!-- forward: begin -->\n<!-- forward: end -->\n", encoding="utf-8")
    options = ["--sequences", "2", "--length", "20", "--repeats", "2", "--threads", "1"]
    done = CliRunner().invoke(forward_command, [*options, "--json", str(file), "--into", str(document)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    names = ["dense", "moe", "moe, loop", "dsc", "dsc, exact router", "dsc, script's layer"]
    assert [row["system"] for row in rows] == names
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in rows)
    text = document.read_text(encoding="utf-8")
    assert "| moe, loop |" in text and "(forward.results.json)" in text
    assert (tmp_path / "forward.results.json").read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    assert "`dsc-serve bench forward --sequences 2 --length 20 --repeats 2 --threads 1`, 20" in text and "cpu " in text


@pytest.mark.skipif(not native.available(), reason="no native kernels here")
@pytest.mark.parametrize(("router", "screened"), [("exact", False), ("int8-certified", True)])
def test_a_model_gets_the_router_that_is_asked_for(router: RouterPrecision, screened: bool) -> None:
    config, before = forward.preset_config("paper", "dsc"), native.router_precision()
    model = build("dsc", SMALL, None, dict(initial_tensors(config, 0, torch.bfloat16)), router)
    assert [layer.layer.screened for layer in dsc_layers(model)] == [screened] * config.num_hidden_layers
    assert native.router_precision() == before


def test_a_wrong_layer_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, x: Tensor) -> Tensor:
            return 3 * x

    monkeypatch.setitem(forward.SYSTEMS, "moe, loop", ("moe", Wrong, "auto"))
    result = run_forward(SMALL)
    row = next(row for row in result.rows if row.system == "moe, loop")
    assert row.mean_ms is None and "differs from ours" in row.wrong
    assert result.mean("moe") is not None


def test_a_document_without_a_place_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(forward, "run_forward", measured)
    document = tmp_path / "benchmarks.md"
    document.write_text("no marks", encoding="utf-8")
    done = CliRunner().invoke(forward_command, ["--into", str(document)])
    assert isinstance(done.exception, ComparisonError) and "has no place for forward" in str(done.exception)
    done = CliRunner().invoke(forward_command, ["--json", str(tmp_path / "missing" / "file.json")])
    assert done.exit_code == 2 and "its folder does not exist" in done.output
