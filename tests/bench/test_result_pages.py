"""Pages of measured tables: each is made of the results beside it, to the letter, or says that it has none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.blocks import audited
from dsc_serve.bench.compare.command import report_command
from dsc_serve.bench.compare.report import markdown
from dsc_serve.bench.compare.results import load_results, save_results
from dsc_serve.bench.step.forward import ForwardBench, ForwardResult, ForwardRow, format_forward
from dsc_serve.bench.step.kept import UnknownResultsError, load_kept, markdown_of_kept
from dsc_serve.cli import main

from .test_findings import results

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = sorted(RESULTS.glob("*.md"))


def made_of(raw: Path, name: str, page: str) -> str:
    """What the results make of a page's measured part, with the charts that the page shows."""
    if name == "forward":
        kept = json.loads(raw.read_text(encoding="utf-8"))
        rows = [ForwardRow(**row) for row in kept["rows"]]
        result = ForwardResult(ForwardBench(**kept["bench"]), kept["machine"], kept["date"], rows)
        return f"{audited(raw.name)}\n\n{format_forward(result)}"
    if is_kept(raw):
        return f"{audited(raw.name)}\n\n{markdown_of_kept(load_kept(raw))}"
    charts = re.findall(rf"\(plots/{re.escape(name)}-([\w-]+)\.svg\)", page)
    return f"{audited(raw.name)}\n\n{markdown(load_results(raw), f'plots/{name}', charts)}"


def is_kept(raw: Path) -> bool:
    """Whether it is of one command, and of no comparison."""
    try:
        return bool(load_kept(raw))
    except UnknownResultsError:
        return False


def faults(file: Path) -> Iterator[str]:
    name, page = file.stem, file.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(name)}: begin -->\n(.*?)\n<!-- {re.escape(name)}: end -->", page, re.DOTALL)
    if found is None:
        yield f"{file.name} has no measured part"
        return
    raw = file.with_name(f"{name}.results.json")
    if raw.exists():
        if found.group(1) != made_of(raw, name, page):
            yield f"{file.name} is not what {raw.name} makes"
    elif not found.group(1).startswith("Not auditable yet"):
        yield f"{file.name} has no {raw.name} and does not say so"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_a_page_is_what_its_results_make_or_says_that_it_has_none(file: Path) -> None:
    assert list(faults(file)) == []


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
        assert done.exit_code == 1 and "was not written by --json of bench context, quantised" in done.output
