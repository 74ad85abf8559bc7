"""Pages of measured tables: each is made of the results beside it, to the letter, or says that it has none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.comparison import GROUPS
from dsc_serve.bench.compare.overview import OVERVIEWS, overview
from dsc_serve.bench.compare.pages import page_of, page_part
from dsc_serve.bench.compare.report_command import report_command
from dsc_serve.bench.compare.results import save_results
from dsc_serve.bench.step.kept import TABLES
from dsc_serve.cli import main

from .test_findings import results

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = sorted(RESULTS.glob("*.md"))


def made_of(raw: Path, name: str, page: str) -> str:
    """What the results make of a page's measured part, with the charts that the page shows."""
    charts = re.findall(rf"\(plots/{re.escape(name)}-([\w-]+)\.svg\)", page)
    return page_part(page_of(raw, name, charts), raw.name)


def measured_part(name: str, document: str) -> str | None:
    own = re.escape(name)
    found = re.search(rf"<!-- {own}: begin -->\n(.*?)\n<!-- {own}: end -->", document, re.DOTALL)
    return None if found is None else found.group(1)


def faults(file: Path) -> Iterator[str]:
    name, page = file.stem, file.read_text(encoding="utf-8")
    found, raw = measured_part(name, page), file.with_name(f"{name}.results.json")
    if found is None:
        yield f"{file.name} has no measured part"
    elif name in OVERVIEWS:
        if found != overview(name, file.parent, file):
            yield f"{file.name} is not what the results beside it make"
    elif name in GROUPS:
        if found != overview("answers", file.parent, file, GROUPS[name]):
            yield f"{file.name} is not what the results of its parts make"
    elif raw.exists():
        if found != made_of(raw, name, page):
            yield f"{file.name} is not what {raw.name} makes"
    elif not found.startswith(("Not auditable yet", "Not measured yet")):
        yield f"{file.name} has no {raw.name} and does not say so"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_a_page_is_what_its_results_make_or_says_that_it_has_none(file: Path) -> None:
    assert list(faults(file)) == []


@pytest.mark.parametrize(("file", "name"), [("README.md", "summary"), ("docs/benchmarks.md", "answers")])
def test_what_documents_say_of_all_pages_is_what_their_results_make(file: str, name: str) -> None:
    document = RESULTS.parents[1] / file
    assert measured_part(name, document.read_text(encoding="utf-8")) == overview(name, RESULTS, document)


def test_every_file_of_results_has_its_page() -> None:
    assert {file.name.removesuffix(".results.json") for file in RESULTS.glob("*.json")} <= {file.stem for file in PAGES}
    assert len(PAGES) >= 5


def test_a_page_that_was_changed_by_hand_or_lost_its_results_is_seen(tmp_path: Path) -> None:
    page, run = tmp_path / "own.md", tmp_path / "run"
    run.mkdir()
    save_results(results({1: [5.0, 5.5], 8: [6.0, 6.0]}), run / "results.json")
    page.write_text("# Own\n\n<!-- own: begin -->\n<!-- own: end -->\n", encoding="utf-8")
    options = [str(run), "--into", str(page), "--name", "own", "--chart", "goodput"]
    assert CliRunner().invoke(report_command, options).exit_code == 0
    written = page.read_text(encoding="utf-8")
    assert list(faults(page)) == [] and "plots/own-goodput.svg" in written
    page.write_text(written.replace("| dsc | 191 |", "| dsc | 291 |", 1), encoding="utf-8")
    assert list(faults(page)) == ["own.md is not what own.results.json makes"]
    (tmp_path / "own.results.json").unlink()
    assert list(faults(page)) == ["own.md has no own.results.json and does not say so"]


MACHINE = {"cpu": "one", "cores": 2, "date": "2026-11-29", "load_average": 0.1}
RATIOS = {"ratio": 1.0, "lowest": 0.9, "highest": 1.1}
STEP = {"system": "stored", "streams": 1, "step_ms": 2.5, "tokens_per_s": 400.0, **RATIOS, "read_ratio": 1.2}
KEPT: dict[str, dict[str, Any]] = {
    "context": {
        "rows": [
            {
                "model": "m",
                "kv_dtype": "int8",
                "streams": 1,
                "context": 9,
                "token_bytes": 5,
                "held_bytes": 6,
                "step_ms": 7.0,
            }
            | RATIOS
        ]
    },
    "quantised": {
        "bytes": {"stored": 98_000_000},
        "steps": [STEP, STEP | {"system": "llama.cpp", "read_ratio": None}],
        "prompts": [{"system": "stored", "tokens": 1000, "ms": 1500.0, **RATIOS}],
        "quality": [{"system": "stored", "tokens": 512, "bits_per_byte": 1.5, "off": 0.0002, "argmax": 0.999}],
    },
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_one_command_kept_becomes_a_page(kind: str, tmp_path: Path) -> None:
    file, page = tmp_path / "kept.json", tmp_path / "own.md"
    file.write_text(json.dumps({"command": f"dsc-serve bench {kind} m", "machine": MACHINE, **KEPT[kind]}))
    page.write_text("# Own\n\n<!-- own: begin -->\n<!-- own: end -->\n", encoding="utf-8")
    done = CliRunner().invoke(main, ["bench", "report", str(file), "--into", str(page), "--name", "own"])
    assert done.exit_code == 0, done.output
    assert list(faults(page)) == []
    written = page.read_text(encoding="utf-8")
    assert f"`dsc-serve bench {kind} m`, 2026-11-29; cpu one, cores 2, load average 0.1." in written
    assert ("| m | int8 | 1 | 9 | 5 |" if kind == "context" else "| llama.cpp | 1 | 2.500 |") in written
    page.write_text(written.replace("0.900", "0.800"), encoding="utf-8")
    assert list(faults(page)) == ["own.md is not what own.results.json makes"]


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"command": "dsc-serve bench layer"}', '{"command": 3}'):
        file = tmp_path / "other.json"
        file.write_text(content)
        done = CliRunner().invoke(main, ["bench", "report", str(file)])
        assert done.exit_code == 1
        assert "was not written by bench compare, nor by --json of bench context, quantised" in done.output


def test_what_every_command_keeps_has_tables() -> None:
    """Of those that measure, only `serve`, which has no rounds, and those with reports of their own have none."""
    bench = main.get_command(click.Context(main), "bench")
    assert isinstance(bench, click.Group)
    keeping = {
        name for name, command in bench.commands.items() if any("--json" in option.opts for option in command.params)
    }
    assert keeping - {"serve"} == TABLES.keys()
    assert bench.commands.keys() - keeping == {"compare", "report", "peer-model", "peer-adapters", "decide"}


def test_parts_of_a_group_get_a_page_each_and_one_that_leads_to_them(tmp_path: Path) -> None:
    runs, pages = tmp_path / "runs" / "mixture", tmp_path / "docs" / "results"
    pages.mkdir(parents=True)
    for name in ("mixture-olmoe", "mixture-qwen"):
        (runs / name).mkdir(parents=True)
        made = results({1: [5.0] * 5, 8: [6.0, 6.1, 6.0, 6.1, 6.0]})
        made.title = f"DSC beside {name}"
        save_results(made, runs / name / "results.json")
    assert CliRunner().invoke(main, ["bench", "report", str(runs)]).exit_code == 0
    assert all((runs / name / "report.html").is_file() for name in ("mixture-olmoe", "mixture-qwen"))
    (pages.parent / "benchmarks.md").write_text("# How\n", encoding="utf-8")
    command = ["bench", "report", str(runs), "--into", str(pages / "mixture.md"), "--name", "mixture"]
    assert CliRunner().invoke(main, command).exit_code == 0
    text = (pages / "mixture.md").read_text(encoding="utf-8")
    assert "[DSC beside mixture-olmoe](mixture-olmoe.md). dsc beside moe, tokens per second: more at 1 and 8" in text
    own = (pages / "mixture-qwen.md").read_text(encoding="utf-8")
    assert own.startswith("# DSC beside mixture-qwen\n") and "[benchmarks.md](../benchmarks.md)" in own
    assert (pages / "plots" / "mixture-qwen-throughput.svg").is_file()
    assert [fault for page in pages.glob("*.md") for fault in faults(page)] == []
    (pages / "mixture.md").write_text(text.replace("2.00", "3.00"), encoding="utf-8")
    assert list(faults(pages / "mixture.md")) == ["mixture.md is not what the results of its parts make"]
    assert CliRunner().invoke(main, command).exit_code == 0 and (pages / "mixture.md").read_text() == text
