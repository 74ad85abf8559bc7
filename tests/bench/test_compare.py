from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from dsc_serve.bench import compare
from dsc_serve.bench.compare_command import compare_command, report_command
from dsc_serve.bench.comparison import LEAST_REQUESTS
from dsc_serve.bench.results import load_results

SERVER = Path(__file__).parent / "answering_server.py"
SYSTEM = """
[[system]]
name = "{name}"
folder = "unused"
command = ["{program}", "{script}", "{{port}}", "{pause}"]
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

    monkeypatch.setattr(compare, "run_tool", canned)


def write(tmp_path: Path, **programs: tuple[str, str, str]) -> Path:
    file = tmp_path / "own.toml"
    systems = [
        SYSTEM.format(name=name, program=program, script=script, pause=pause)
        for name, (program, script, pause) in programs.items()
    ]
    file.write_text(COMPARISON + "".join(systems), encoding="utf-8")
    return file


def alive(script: str) -> bool:
    return any(script.encode() in file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.is_file())


@pytest.mark.parametrize("alone", [False, True])
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
    assert page.count("<svg") == 8 and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
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
