"""Runs a comparison of speculation, or goes on with one, and writes what it found."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from dsc_serve.bench.compare.elements import markdown_of, page
from dsc_serve.bench.compare.resuming import Deadline, OutOfTimeError
from dsc_serve.bench.compare.speculation.asked import SpeculationComparison
from dsc_serve.bench.compare.speculation.drafted import DraftedRun
from dsc_serve.bench.compare.speculation.found import SpeculationResults, go_on, load, save
from dsc_serve.bench.compare.speculation.page import TITLE, elements
from dsc_serve.bench.compare.speculation.texts import TASKS, TextRun, TextTask
from dsc_serve.bench.machine import describe_machine, load_average, widest_instructions
from dsc_serve.config import EngineConfig
from dsc_serve.machine import default_threads

RESULTS, PAGE, TABLES = "results.json", "report.html", "report.md"


def run_speculation(
    asked: SpeculationComparison,
    out: Path,
    work: Path,
    command: str,
    report: Callable[[str], None],
    resume: bool = False,
    minutes: float = 0.0,
    text_model: Path | None = None,
    tasks: tuple[TextTask, ...] = TASKS,
) -> tuple[SpeculationResults, bool]:
    """Measure what is missing of a comparison; returns all there is, and whether nothing is missing any more.

    out: where the results lie after each measurement, and at last the report. work: where models of random weights are
    kept. minutes: after so many nothing new is begun; 0: to the end. text_model: for real work; None: there is none.
    Raises ComparisonError, ConfigError and CheckpointError in one line.
    """
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    results = SpeculationResults(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        client=command,
        machine={
            **describe_machine(),
            "instructions": widest_instructions(),
            "threads": asked.threads or default_threads(),
            "load_before": load_average(),
        },
        asked=asked,
        text_model="" if text_model is None else text_model.name,
    )
    if resume and (out / RESULTS).is_file():
        go_on(load(out / RESULTS), results)
    deadline, whole = Deadline(minutes), True

    def done() -> None:
        results.machine["load_after"] = load_average()
        save(results, out / RESULTS)
        deadline.check()

    threads = torch.get_num_threads()
    try:
        if text_model is not None:  # first: it takes minutes, and the systems hours
            measure_texts(asked, text_model, tasks, results, report, done)
        DraftedRun(asked, work.resolve(), results, report).measure(done)
    except OutOfTimeError:
        whole = False
    finally:
        torch.set_num_threads(threads)
    save(results, out / RESULTS)
    write_report(results, out)
    return results, whole


def write_report(results: SpeculationResults, out: Path) -> None:
    """As a page, and as tables in Markdown."""
    made = elements(results)
    (out / PAGE).write_text(page(TITLE, made), encoding="utf-8")
    (out / TABLES).write_text(f"# {TITLE}\n\n{markdown_of(made)}\n", encoding="utf-8")


def measure_texts(
    asked: SpeculationComparison,
    text_model: Path,
    tasks: tuple[TextTask, ...],
    results: SpeculationResults,
    report: Callable[[str], None],
    done: Callable[[], None],
) -> None:
    """In float32, in which answers with and without drafts are to be the same to the byte."""
    kept = {(row.task, row.round) for row in results.texts}
    if all((task.name, number) in kept for task in tasks for number in range(asked.text_rounds)):
        return
    report(f"{text_model.name}: loading")
    config = EngineConfig(
        model=str(text_model), threads=asked.threads, dtype="float32", max_drafts=asked.max_drafts, max_running=1
    )
    run = TextRun(config, tasks)
    try:
        run.measure(asked.text_rounds, results, report, done)
    finally:
        run.close()
