from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dsc_kernels import native
from dsc_serve.bench.layer import command, measurement, sweep
from dsc_serve.bench.layer.command import layer_command as bench_layer
from dsc_serve.bench.layer.measurement import LayerBench, LayerBenchError, rotation_layers, run_layer_bench
from dsc_serve.bench.layer.systems import CONFIGS, PATHS, LayerSystem
from dsc_serve.bench.layer.table import format_layers
from dsc_serve.bench.plot import line_chart
from dsc_serve.bench.step.kept import load_kept, markdown_of_kept

SMALL = ["--config", "tiny", "--repeats", "2", "--layers", "2", "--seconds", "1", "--threads", "1"]
FIELDS = {
    *("system", "path", "batch", "dtype", "threads", "us", "ratio_to_best_moe", "ratio_to_plain_moe"),
    *("roofline_share", "bytes", "flops"),
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def short_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measurement, sweep):
        monkeypatch.setattr(module, "RATE_SECONDS", 0.01)
    monkeypatch.setattr(measurement, "SAMPLE_SECONDS", 1e-4)


def present(path: str) -> bool:
    return path != "native" or bool(native.available())


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.full), "float32"])
def test_the_command_prints_tables_and_writes_json_and_svg(dtype: str, tmp_path: Path) -> None:
    threads, kernels = torch.get_num_threads(), native.active()
    out, plot = tmp_path / "layer.json", tmp_path / "layer.svg"
    files = ["--json", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(bench_layer, [*SMALL, "--batches", "1,4", "--dtype", dtype, *files])
    assert result.exit_code == 0, result.output
    assert "microseconds per layer" in result.stdout and "time / that of the best MoE path" in result.stdout
    assert "routing is uniform" in result.stdout and "equal in total parameters" in result.stdout
    assert (torch.get_num_threads(), native.active()) == (threads, kernels)

    written = json.loads(out.read_text(encoding="utf-8"))
    assert {"machine", "command", "date", "rows"} <= written.keys()
    page = markdown_of_kept(load_kept(out))
    assert result.stdout[result.stdout.index("microseconds per layer") :].rstrip() in page, "as printed"
    assert {"cpu", "load_before", "load_after", "threads", "kernels"} <= written["machine"].keys()
    assert written["command"].startswith("dsc-serve bench layer --config tiny") and str(tmp_path) not in str(written)
    rows = {(row["system"], row["path"], row["batch"]): row for row in written["rows"]}
    assert set(rows) == {(*name, batch) for name in PATHS if present(name[1]) for batch in (1, 4)}
    for row in rows.values():
        assert row.keys() >= FIELDS
        assert row["us"] > 0 and row["bytes"] > 0 and row["flops"] > 0 and row["wrong"] is None
        assert row["dtype"] == dtype and row["threads"] == 1
    moe = [row for row in rows.values() if row["system"] == "moe" and row["batch"] == 4]
    dsc, plain = rows["dsc", "plain", 4], rows["moe", "sorted", 4]
    assert dsc["ratio_to_best_moe"] == pytest.approx(dsc["us"] / min(row["us"] for row in moe))
    assert dsc["ratio_to_plain_moe"] == pytest.approx(dsc["us"] / plain["us"])
    assert plain["ratio_to_plain_moe"] == 1

    root = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
    assert root.tag == f"{SVG}svg" and len(root.findall(f"{SVG}polyline")) == len(rows) / 2


def test_a_wrong_system_gets_no_time_and_is_named() -> None:
    def nonsense(x: Tensor) -> Tensor:
        return x + 1

    def crash(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    injected = {
        "dsc": [LayerSystem("dsc", "nonsense", [nonsense] * 2)],
        "moe": [LayerSystem("moe", "crash", [crash] * 2)],
    }
    bench = LayerBench(config="tiny", batches=(4,), repeats=1, layers=2, seconds=0.1, threads=1)
    result = run_layer_bench(bench, injected=injected)
    rows = {(row.system, row.path): row for row in result.rows}
    for name, reason in {("dsc", "nonsense"): "relative error", ("moe", "crash"): "raised RuntimeError"}.items():
        row = rows.pop(name)
        assert row.us is row.ratio_to_best_moe is row.ratio_to_plain_moe is row.roofline_share is None
        assert reason in str(row.wrong)
    assert all(row.us and row.wrong is None for row in rows.values())
    assert "WRONG: dsc nonsense at batch 4: relative error" in format_layers(result)
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_wrong_result_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(measurement.expected.__globals__["TOLERANCE"], torch.bfloat16, -1.0)
    plot = tmp_path / "layer.svg"
    result = CliRunner().invoke(bench_layer, [*SMALL, "--batches", "1", "--plot", str(plot)])
    assert result.exit_code == 1 and "WRONG: dense plain at batch 1" in result.stdout
    assert "Traceback" not in result.output and not plot.exists()


@pytest.mark.parametrize("swept", ["atoms", pytest.param("picks", marks=pytest.mark.full)])
def test_a_sweep_splits_time_and_bytes_by_part(swept: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sweep.SWEEPS, swept, sweep.SWEEPS[swept][:2])
    out, plot = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    result = CliRunner().invoke(bench_layer, [*SMALL, "--sweep", swept, "--json", str(out), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
    assert result.stdout[result.stdout.index("    B ") :].rstrip() in markdown_of_kept(load_kept(out)), "as printed"
    for row in rows:
        assert row.keys() >= FIELDS | {"atoms", "picks"}
        parts = [row[f"{part}_us"] for part in ("router", "static", "bank")]
        assert sum(parts) == pytest.approx(row["us"])
        assert row["router_bytes"] == row["atoms"] * 32 * 2
        assert row["router_bytes"] + row["static_bytes"] + row["bank_bytes"] == pytest.approx(row["bytes"], abs=2)
        assert row["ratio_to_best_moe"] is None
    assert len({row[swept] for row in rows}) == 2
    ElementTree.fromstring(plot.read_text(encoding="utf-8"))


def test_what_cannot_be_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        (["--device", "cuda"], "no CUDA device on this machine; use --device cpu"),
        (["--batches", "1,x"], "not a list of whole numbers such as 1,4,16"),
        (["--batches", "0"], "batches: 0 is not allowed; it must be at least 1"),
    ):
        result = CliRunner().invoke(bench_layer, [*SMALL, *options])
        assert result.exit_code != 0 and message in result.output and "Traceback" not in result.output
    with pytest.raises(LayerBenchError, match="batches is empty"):
        LayerBench(batches=())


def test_rotation_exceeds_the_last_level_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "last_level_cache", lambda: 32_000_000)
    cpu = torch.device("cpu")
    assert rotation_layers(2_000_000, cpu) == 32
    assert rotation_layers(50_000_000, cpu) == 8
    assert rotation_layers(50_000_000, cpu, least=2) == 2
    assert rotation_layers(1000, cpu) == 64


def test_no_more_layers_rotate_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of hundreds of megabytes asks for more layers of a large mixture than fit beside each other."""
    bench = LayerBench(config="tiny", dtype="float32", batches=(1,), repeats=1, threads=1, seconds=0.0)
    plenty: list[str] = []
    layers = len(measurement.build_groups(bench, plenty)[0].systems[0].layers)
    one = sum(group.rotated for group in measurement.build_groups(bench, [])) // layers
    monkeypatch.setattr(measurement, "available_memory", lambda: 3 * 2 * measurement.COPIES * one)
    assert layers > 3
    assert {len(system.layers) for group in measurement.build_groups(bench, []) for system in group.systems} == {3}


def test_layers_are_run_in_rotation() -> None:
    seen: list[int] = []

    def layer_of(i: int) -> command.Any:
        return lambda x: seen.append(i)

    system = LayerSystem("dsc", "native", [layer_of(i) for i in range(3)])
    x = torch.zeros(1, 1)
    system.run(x, 2)
    system.run(x, 5)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_chart_escapes_text_and_refuses_what_has_no_logarithm() -> None:
    svg = line_chart("a < b & c", "x", "y", {"one <1>": [(1, 3.0), (4096, 70.0)], "two": [(1, 0.5)]})
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"a < b & c", "one <1>", "4,096", "0.5", "100"} <= set(texts)
    for series in ({}, {"one": [(0, 1.0)]}):
        with pytest.raises(ValueError, match="logarithmic"):
            line_chart("t", "x", "y", series)


def test_parsing_the_command_loads_no_torch() -> None:
    code = "import dsc_serve.bench.layer.command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert command.CONFIGS == CONFIGS
