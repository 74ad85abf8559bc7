"""What all kept results say together: rows, lines and rounds are those of the results, to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.comparison import ComparisonError, load_comparison
from dsc_serve.bench.compare.overview import PAIRS, SIZES, overview
from dsc_serve.bench.compare.results import ResultRow, Results, save_results
from dsc_serve.bench.compare.speculation.asked import SpeculationComparison
from dsc_serve.bench.compare.speculation.found import DraftedRow, SpeculationResults, save
from dsc_serve.cli import main

from .test_findings import figures, results

MACHINE = {"cpu": "a cpu", "threads": 2}


def large() -> Results:
    """ "dsc int8" wins at 8 and 16 streams, at 1 rounds disagree, and at 32 the median is next to 1."""
    made = results({1: [9.0, 11.0, 9.5], 8: [8.0, 8.0, 8.5], 16: [5.0, 5.0, 5.0], 32: [9.95, 9.9, 9.95]})
    made.comparison = msgspec.to_builtins(load_comparison("large-cpu"))
    for row in made.rows:
        row.system = "dsc int8" if row.system == "dsc" else "moe"
    made.systems[0].name = "dsc int8"
    return made


def drafted() -> SpeculationResults:
    rows = [
        DraftedRow(preset="large", system=system, streams=1, round=number, rate=rate, ms=ms + number)
        for system, ms in (("dsc", 10.0), ("moe", 20.0))
        for rate in (None, 0.7)
        for number in range(2)
    ]
    asked = SpeculationComparison(rounds=3)
    return SpeculationResults(date="2026-01-02", client="c", machine=dict(MACHINE), asked=asked, drafted=rows)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    save_results(large(), folder / "large-cpu.results.json")
    (folder / "large-cpu.md").write_text("# 400 M parameters\n", encoding="utf-8")
    save(drafted(), folder / "speculation.results.json")
    steps = [
        {"system": name, "streams": streams, "tokens_per_s": rate, "peer_ratio": 50.0 / rate}
        for streams in (1, 8)
        for name, rate in (("stored", 200.0 * streams), ("llama.cpp", 50.0))
    ]
    kept: dict[str, Any] = {"command": "dsc-serve bench quantised m.gguf", "machine": MACHINE, "steps": steps}
    (folder / "quantised-q4_1.results.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def test_a_row_for_each_pair_tells_rates_and_ratios_and_which_rounds_agree(pages: Path) -> None:
    text = overview("summary", pages, pages.parents[1] / "README.md")
    rates, ratios = "105, 125, 200, 101 | 100, 100, 100, 100", "1.05, **1.25**, **2.00**, 1.01"
    row = f"| DSC, 400 M | our own MoE, as large | {rates} | [{ratios}](docs/results/large-cpu.md) |"
    assert row in text.splitlines()
    gguf = "| SmolLM2-135M, its Q4_1 file, steps alone (1, 8 streams) | llama.cpp, the same file |"
    cells = "| 200.0, 1600.0 | 50.0, 50.0 | [4.00, 32.00](docs/results/quantised-q4_1.md) |"
    assert gguf + cells.removeprefix("|") in text.splitlines()
    assert text.endswith("Measured on: large-cpu, quantised-q4_1: a cpu, 2 threads.")
    assert "exact router" not in text, "what was not measured has no row"


def test_a_line_for_each_page_leads_there_and_says_what_it_found(pages: Path) -> None:
    lines = overview("answers", pages, pages.parent / "benchmarks.md").splitlines()
    assert lines[0].startswith("- [400 M parameters](results/large-cpu.md). dsc had no load")
    assert lines[1] == "- [quantised-q4_1](results/quantised-q4_1.md)."
    assert lines[2].startswith("- [speculation](results/speculation.md). Drafts that are right 0.7 of the time")
    assert overview("answers", pages, pages / "own.md", ["quantised-q4_1"]) == "- [quantised-q4_1](quantised-q4_1.md)."


def test_every_round_of_dsc_beside_moe_stands_on_one_page(pages: Path) -> None:
    text = overview("dsc-moe", pages, pages / "dsc-moe.md")
    assert "### [400 M parameters](large-cpu.md)" in text
    cells = "1.05 (1.11, 0.91, 1.05; 3 rounds of 5) | **1.25** (1.25, 1.25, 1.18; 3 rounds of 5)"
    assert f"| dsc int8, router int8-certified | {cells} | **2.00** (2.00, 2.00, 2.00" in text
    assert "### [Steps of the engine alone, without and with drafts, 400 M](speculation.md)" in text
    for name in ("no drafts", "drafts right 0.7 of the time"):
        assert f"| {name} | **1.95** (2.00, 1.91; 2 rounds of 3) |" in text
    (pages / "large-cpu.results.json").unlink()
    (pages / "speculation.results.json").unlink()
    assert overview("dsc-moe", pages, pages / "dsc-moe.md") == "Not measured yet."


def test_the_command_puts_it_into_a_document_or_makes_one(pages: Path) -> None:
    readme = pages.parents[1] / "README.md"
    readme.write_text("# R\n\n<!-- summary: begin -->\nold\n<!-- summary: end -->\nafter\n", encoding="utf-8")
    for file, name in ((readme, "summary"), (pages / "dsc-moe.md", "dsc-moe")):
        done = CliRunner().invoke(main, ["bench", "report", str(pages), "--into", str(file), "--name", name])
        assert done.exit_code == 0, done.output
        assert overview(name, pages, file) in file.read_text(encoding="utf-8")
    assert "old" not in readme.read_text() and readme.read_text().endswith("-->\nafter\n")
    assert (pages / "dsc-moe.md").read_text().startswith("# DSC beside a mixture of experts, all rounds\n")
    empty = pages.parent / "none"
    empty.mkdir()
    with pytest.raises(ComparisonError, match="none has no results; "):
        overview("answers", empty, readme)


def test_pairs_and_sizes_are_of_comparisons_that_there_are() -> None:
    for pair in PAIRS:
        names = {system.name for system in load_comparison(pair.source).system}
        assert {pair.here, pair.there} <= names, pair
    for source in SIZES:
        comparison = load_comparison(source)
        kinds = {system.name: system.ffn for system in comparison.system}
        assert kinds[comparison.baseline] == "moe" and "dsc" in kinds.values()
        assert comparison.streams == (1, 8, 16, 32)
    assert SpeculationComparison().streams == (1, 8, 16, 32)


def test_rows_that_were_measured_under_other_loads_are_not_mixed(pages: Path) -> None:
    made = large()
    made.rows.append(ResultRow(system="dsc int8", load="open", value=8, round=0, figures=figures(1.0)))
    before = overview("summary", pages, pages / "x.md")
    save_results(made, pages / "large-cpu.results.json")
    assert overview("summary", pages, pages / "x.md") == before
