from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare import runner
from dsc_serve.bench.compare.command import compare_command
from dsc_serve.bench.compare.comparison import LEAST_REQUESTS, ComparedSystem, Comparison, ComparisonError
from dsc_serve.bench.compare.processes import ServerStartError
from dsc_serve.bench.compare.report_command import report_command
from dsc_serve.bench.compare.results import ResultRow, Results, load_results
from dsc_serve.bench.compare.resuming import Deadline
from dsc_serve.bench.load.generator import LoadConfig
from dsc_serve.bench.load.summary import LoadResult

SERVER = Path(__file__).parent / "answering_server.py"
SYSTEM = """
[[system]]
name = "{name}"
folder = "unused"
command = ["{program}", "{script}", "{{port}}", {arguments}]
environment = {{ A_SETTING = "1" }}
"""
COMPARISON = """
title = "Two paces"
subject = "fast"
baseline = "slow"
prompt_tokens = 3
output_tokens = 5
streams = [1, 2]
waves = 2
rounds = 2
rates = [0.5]
rate_seconds = 0.5
limits = { ttft = 1000.0 }
start_timeout_s = 60.0
"""


@pytest.fixture(autouse=True)
def descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is inside these models nobody asks."""

    def canned(command: Sequence[str]) -> str:
        described = {"ffn": "none", "frame": "none", "parameters": 10**6, "active": 10**5, "ffn_bytes": 10}
        return json.dumps({"description": described, "steps": {}, "torch": "2.13.0"})

    monkeypatch.setattr(runner, "run_tool", canned)


def write(tmp_path: Path, **programs: tuple[str, ...]) -> Path:
    file = tmp_path / "own.toml"
    systems = [
        SYSTEM.format(name=name, program=program, script=script, arguments=json.dumps(arguments)[1:-1])
        for name, (program, script, *arguments) in programs.items()
    ]
    file.write_text(COMPARISON + "".join(systems), encoding="utf-8")
    return file


def alive(script: str) -> bool:
    return any(script.encode() in file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.is_file())


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.full)])
def test_systems_are_measured_in_turn_and_reported(tmp_path: Path, alone: bool) -> None:
    script = tmp_path / "answering_server.py"
    script.write_bytes(SERVER.read_bytes())
    file = write(
        tmp_path,
        fast=(sys.executable, str(script), "0.002"),
        slow=(sys.executable, str(script), "0.02"),
        absent=("a-program-that-nobody-has", str(script), "0"),
        broken=(sys.executable, str(tmp_path / "missing.py"), "0"),
    )
    out, ratios = tmp_path / "out", tmp_path / "ratios.json"
    options = ["--out", str(out), "--ratios", str(ratios), "--keep-ratios", *(["--alone"] if alone else [])]
    done = CliRunner().invoke(compare_command, [str(file), *options])
    assert done.exit_code == 0, done.output
    assert not alive(str(script)), "every server is stopped"

    results = load_results(out / "results.json")
    assert results.measured() == ["fast", "slow"]
    assert {system.name: bool(system.skipped) for system in results.systems} == {
        "fast": False,
        "slow": False,
        "absent": True,
        "broken": True,
    }
    assert "absent is skipped: a-program-that-nobody-has is not installed" in done.output
    assert "broken is skipped: it ended with status 2" in done.output and "missing.py" in done.output
    assert {(row.system, row.load, row.value, row.round) for row in results.rows} == {
        (name, load, value, number)
        for name in ("fast", "slow")
        for load, value in (("closed", 1), ("closed", 2), ("open", 0.5))
        for number in (0, 1)
    }
    slow = results.median("slow", "closed", 2, "median_itl_ms")
    assert slow is not None and 18 < slow < 60
    for row in results.rows:
        assert row.figures["failed"] == 0
        if row.load == "closed":
            assert row.figures["completed"] == max(LEAST_REQUESTS, 2 * row.value)
    ratio = results.ratio("fast", "slow", "closed", 1, "median_itl_ms")
    assert ratio is not None and ratio.median < 0.6
    assert "fast wins" in done.output
    memory = {system.name: system.memory_bytes for system in results.systems}
    assert memory["fast"] > 2**20 and memory["absent"] == 0

    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 9 and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    for text in ("Two paces", "fast wins", "absent was skipped", "A_SETTING=1", "within the limits"):
        assert text in page
    for chart in out.glob("*.svg"):
        ElementTree.fromstring(chart.read_text(encoding="utf-8"))
    assert "fast / slow, median_itl_ms, 1 streams" in ratios.read_text(encoding="utf-8")


def test_a_comparison_in_which_nothing_runs_ends_with_status_1(tmp_path: Path) -> None:
    file = write(tmp_path, fast=("nobody-has-it", "x", "0"), slow=("nobody-has-it", "x", "0"))
    done = CliRunner().invoke(compare_command, [str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "fast was not measured, so nothing can be said of it." in done.output
    assert CliRunner().invoke(report_command, [str(tmp_path / "out")]).exit_code == 0


def test_a_server_that_dies_drops_out_and_what_it_measured_before_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "answering_server.py"
    script.write_bytes(SERVER.read_bytes())
    # each load of the first round: 6 requests to warm up and 12 that count, closed with 1 and with 2 streams
    file = write(
        tmp_path, fast=(sys.executable, str(script), "0.001", "40"), slow=(sys.executable, str(script), "0.002")
    )
    done = CliRunner().invoke(compare_command, [str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert not alive(str(script))
    results = load_results(tmp_path / "out" / "results.json")
    assert all(row.figures["failed"] == 0 for row in results.rows), "no figure of a server that was dying"
    assert [(row.load, row.value) for row in results.rows if row.system == "fast"] == [("closed", 1), ("closed", 2)]
    assert "fast is skipped from here on: it ended with status 9: out of something" in done.output
    assert (
        "fast was measured in 1 of 2 rounds." in done.output
        and "by a single round, which tells nothing apart" in done.output
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "it was not measured to the end: it ended with status 9" in page and "fast was skipped" not in page


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, OSError])
def test_what_was_measured_before_an_end_is_kept_and_every_server_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    script = tmp_path / "answering_server.py"
    script.write_bytes(SERVER.read_bytes())
    file = write(tmp_path, fast=(sys.executable, str(script), "0"), slow=(sys.executable, str(script), "0"))
    measure, out = runner.run_load, tmp_path / "out"

    def ended_in_the_second_load(config: LoadConfig) -> LoadResult:
        if config.concurrency == 2:
            raise ending("as it happens")
        return measure(config)

    monkeypatch.setattr(runner, "run_load", ended_in_the_second_load)
    done = CliRunner().invoke(compare_command, [str(file), "--out", str(out)])
    assert done.exit_code == 1 and not alive(str(script))
    assert f"`dsc-serve bench report {out}` writes its report" in done.output
    results = load_results(out / "results.json")
    assert {(row.system, row.value) for row in results.rows} == {("fast", 1), ("slow", 1)}
    assert CliRunner().invoke(report_command, [str(out)]).exit_code == 0
    assert "Medians over 1 of 2 interleaved rounds" in (out / "report.html").read_text(encoding="utf-8")


def test_open_loads_are_the_same_in_every_round_and_prompts_never() -> None:
    systems = [{"name": n, "ffn": "dsc"} for n in ("fast", "slow")]
    comparison = msgspec.convert({**tomllib.loads(COMPARISON), "system": systems, "temperature": 0.7}, Comparison)
    results = Results(title="", date="", client="", machine={}, comparison={})
    for number, rate in enumerate((10.0, 30.0)):
        figures = {"completed": 12, "failed": 0, "request_throughput": rate}
        results.rows.append(ResultRow(system="slow", load="closed", value=1, round=number, figures=figures))
        assert runner.peak_rate(results, "slow") == 10.0
    points = [("closed", 8.0), ("closed", 108.0), ("open", 0.8), ("open", 0.85), ("open", 8.0)]
    loads = [
        runner.load_config(comparison, comparison.system[0], "http://x", load, value, number, 5.0)
        for load, value in points
        for number in range(3)
    ]
    assert len({load.seed for load in loads}) == len(loads)
    assert {load.temperature for load in loads} == {0.7}


def test_prompts_that_cannot_be_made_are_said_before_anything_starts(tmp_path: Path) -> None:
    file = write(tmp_path, fast=(sys.executable, "x", "0"), slow=(sys.executable, "x", "0"))
    (tmp_path / "short.txt").write_text("two words", encoding="utf-8")
    text = file.read_text(encoding="utf-8").replace("waves", f'prompt_file = "{tmp_path / "short.txt"}"\nwaves')
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ComparisonError, match="has 2 words; a prompt needs 3"):
        CliRunner().invoke(compare_command, [str(file), "--out", str(tmp_path / "out")], catch_exceptions=False)


def test_every_system_comes_first_and_none_always_follows_the_same() -> None:
    systems = [ComparedSystem(name=name, ffn="dsc") for name in "abcd"]
    orders = [[system.name for system in runner.rotated(systems, number)] for number in range(4)]
    assert [order[0] for order in orders] == ["a", "b", "c", "d"]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    for name in "abcd":
        assert len({order[order.index(name) - 1] for order in orders if order[0] != name}) > 1
    assert runner.rotated([], 3) == []


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "answering_server.py"
    script.write_bytes(SERVER.read_bytes())
    file = write(tmp_path, fast=(sys.executable, str(script), "0"), slow=(sys.executable, str(script), "0"))
    measure, out, asked = runner.run_load, tmp_path / "out", list[tuple[int, str]]()

    def counted(config: LoadConfig) -> LoadResult:
        if len(asked) == 4:
            asked.append((0, "ended"))
            raise KeyboardInterrupt
        asked.append((config.seed, config.url))
        return measure(config)

    monkeypatch.setattr(runner, "run_load", counted)
    options = [str(file), "--out", str(out), "--resume"]
    assert CliRunner().invoke(compare_command, options).exit_code == 1
    first = load_results(out / "results.json")
    assert len(first.rows) == 4
    assert CliRunner().invoke(compare_command, options).exit_code == 0
    results = load_results(out / "results.json")
    assert [(row.system, row.load, row.value, row.round) for row in results.rows[:4]] == [
        (row.system, row.load, row.value, row.round) for row in first.rows
    ]
    assert results.rows[:4] == first.rows and len(results.rows) == 12 and results.machine["begun"] == first.date
    assert len(asked) == 5 + 8
    assert CliRunner().invoke(compare_command, options).exit_code == 0 and len(asked) == 5 + 8, "nothing is missing"
    file.write_text(file.read_text(encoding="utf-8").replace("waves = 2", "waves = 3"), encoding="utf-8")
    with pytest.raises(ComparisonError, match="the kept results are of another comparison: its waves is 2"):
        CliRunner().invoke(compare_command, options, catch_exceptions=False)


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_comparison_ends_when_its_minutes_are_over_and_is_whole_after_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    script = tmp_path / "answering_server.py"
    script.write_bytes(SERVER.read_bytes())
    file = write(tmp_path, fast=(sys.executable, str(script), "0"), slow=(sys.executable, str(script), "0"))
    measure, out, begun = runner.run_load, tmp_path / "out", list[str]()

    def ending(config: LoadConfig) -> LoadResult:
        begun.append(config.url)
        monkeypatch.setattr(Deadline, "over", len(begun) % 2 == 0)
        return measure(config)

    monkeypatch.setattr(runner, "run_load", ending)
    options = [str(file), "--out", str(out), "--resume", *(["--alone"] if alone else [])]
    for runs in range(1, 9):
        monkeypatch.setattr(Deadline, "over", False)
        done = CliRunner().invoke(compare_command, options)
        assert done.exit_code == 0 and not alive(str(script)), done.output
        rows = load_results(out / "results.json").rows
        if "its time is over; the same command with --resume goes on" not in done.output:
            break
        if not alone:
            assert len(rows) == 2 * runs and (out / "report.html").is_file()
            assert rows[-1].value == rows[-2].value, "a load is put on all systems or on none"
    assert len({(row.system, row.load, row.value, row.round) for row in rows}) == len(rows) == len(begun) == 12


def test_parts_of_a_group_that_have_no_time_left_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadline, "over", True)
    done = CliRunner().invoke(compare_command, ["mixture", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "mixture-olmoe has not begun; the same command with --resume" in done.output
    assert not (tmp_path / "out").exists()


def test_a_model_may_be_one_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    system = ComparedSystem(name="own", folder=str(file))
    comparison = Comparison(title="", subject="own", baseline="own", system=(system,))
    with pytest.raises(ServerStartError, match=r"its model .*model.gguf does not exist"):
        runner.model_folder(system, comparison, tmp_path)
    file.write_bytes(b"GGUF")
    assert runner.model_folder(system, comparison, tmp_path) == file
