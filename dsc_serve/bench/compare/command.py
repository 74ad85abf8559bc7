"""`dsc-serve bench compare`, `peer-model` and `peer-adapters` on the command line."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from dsc_serve.output_file import OUTPUT_FILE

if TYPE_CHECKING:
    from dsc_serve.bench.compare.comparison import Comparison
    from dsc_serve.bench.compare.results import Results
    from dsc_serve.bench.compare.resuming import Deadline

FOLDER = click.Path(file_okay=False, path_type=Path)
RESULTS = "results.json"
SPECULATION = "speculation"
MINUTES = 25.0  # what has begun by then ends within half an hour


@click.command("compare", context_settings={"show_default": True})
@click.argument("comparison")
@click.option("--out", type=FOLDER, required=True, help="Write results.json, report.html and the charts here.")
@click.option(
    "--models", type=FOLDER, help="Keep models of random weights here, to use them again.  [default: OUT/models]"
)
@click.option("--system", "systems", multiple=True, help="Only this system; may be given several times.")
@click.option("--rounds", type=click.IntRange(1), help="Instead of the comparison's own number.")
@click.option("--alone", is_flag=True, help="One system at a time in memory, started anew in every round.")
@click.option("--resume", is_flag=True, help="Go on from the results in OUT: what was measured is not measured again.")
@click.option(
    "--ratios", type=OUTPUT_FILE, help="Print what moved by more than 10 % against the ratios kept in this file."
)
@click.option("--keep-ratios", is_flag=True, help="Write this run's ratios into that file.")
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    default=MINUTES,
    help="Begin nothing new after so many, and go on with --resume; 0: to the end.",
)
@click.option(
    "--text-model",
    type=click.Path(exists=True, path_type=Path),
    help="speculation: a model that speaks, such as SmolLM2's GGUF file, for real work.",
)
def compare_command(
    comparison: str,
    out: Path,
    models: Path | None,
    systems: tuple[str, ...],
    rounds: int | None,
    alone: bool,
    resume: bool,
    ratios: Path | None,
    keep_ratios: bool,
    minutes: float,
    text_model: Path | None,
) -> None:
    """Measure the systems of COMPARISON side by side and write one report.

    COMPARISON is a TOML file, or one that comes with the package: paper, large-cpu, quick, vllm, smollm2, adapters,
    mixture-olmoe, mixture-granite, mixture-qwen, quantised-paper or quantised-large; mixture is these three and
    quantised these two, each in a folder of its own below OUT.
    After --minutes no load begins, so that a comparison is as many runs of the same command with --resume as it needs.
    speculation compares what several tokens a step are worth, in this process: with drafts that are right at given
    rates, steps by their width, and real work of --text-model.
    """
    from dsc_serve.bench.compare.comparison import load_comparison, members
    from dsc_serve.bench.compare.resuming import Deadline

    if comparison == SPECULATION:
        unusable = {"--alone": alone, "--ratios": ratios is not None, "--keep-ratios": keep_ratios}
        refuse(unusable, "cannot be used with speculation, whose systems run in one process")
        compare_speculation(out, models or out / "models", systems, rounds, resume, minutes, text_model)
        return
    refuse({"--text-model": text_model is not None}, f"can be used with {SPECULATION} alone")
    if keep_ratios and ratios is None:
        raise click.ClickException("--keep-ratios needs --ratios FILE")
    names = members(comparison)
    if ratios is not None and len(names) > 1:
        raise click.ClickException(f"--ratios is of one comparison; {comparison} is {', '.join(names)}")
    asked = {name: load_comparison(name) for name in names}
    for name in names:
        if systems:
            asked[name] = asked[name].only(systems)
        if rounds is not None:
            asked[name] = msgspec.structs.replace(asked[name], rounds=rounds)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))  # so that the servers are stopped
    words = [word for name in systems for word in ("--system", name)]
    words += [*(["--rounds", f"{rounds}"] if rounds is not None else []), *(["--alone"] if alone else [])]
    measured, deadline = True, Deadline(minutes)
    for name in names:
        if deadline.over:
            click.echo(f"{name} has not begun; the same command with --resume goes on")
            break
        own = out / name if len(names) > 1 else out
        results = measure(asked[name], name, own, models or own / "models", words, alone, resume, deadline)
        tell(results, own, ratios, keep_ratios)
        measured &= bool(results.rows)
    if not measured:
        raise SystemExit(1)


def refuse(options: Mapping[str, bool], why: str) -> None:
    """Raises ClickException where one of these options was given."""
    for name, given in options.items():
        if given:
            raise click.ClickException(f"{name} {why}")


def compare_speculation(
    out: Path,
    models: Path,
    systems: tuple[str, ...],
    rounds: int | None,
    resume: bool,
    minutes: float,
    text_model: Path | None,
) -> None:
    """Measure what is missing, and say where the report lies."""
    from dsc_serve.bench.compare.speculation.asked import SpeculationComparison
    from dsc_serve.bench.compare.speculation.running import PAGE, run_speculation

    asked = SpeculationComparison() if rounds is None else SpeculationComparison(rounds=rounds, text_rounds=rounds)
    if systems:
        asked = asked.only(systems)
    words = ["dsc-serve", "bench", "compare", SPECULATION, "--out", out.name]
    words += [word for name in systems for word in ("--system", name)]
    words += [] if rounds is None else ["--rounds", f"{rounds}"]
    words += [] if text_model is None else ["--text-model", text_model.name]

    def report(line: str) -> None:
        click.echo(line, err=True)

    _, whole = run_speculation(asked, out, models, shlex.join(words), report, resume, minutes, text_model)
    if not whole:
        click.echo(f"{minutes:g} minutes are over; the same command with --resume goes on")
    click.echo(f"{out / PAGE} has the report")


def measure(
    asked: Comparison,
    name: str,
    out: Path,
    work: Path,
    words: list[str],
    alone: bool,
    resume: bool,
    deadline: Deadline,
) -> Results:
    """Run a comparison; its results lie in `out` after each load."""
    from dsc_serve.bench.compare.results import load_results, save_results
    from dsc_serve.bench.compare.runner import run_comparison

    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    command = ["dsc-serve", "bench", "compare", Path(name).name, "--out", out.name, *words]  # no folders of here
    kept: list[Path] = []
    before = load_results(out / RESULTS) if resume and (out / RESULTS).is_file() else None

    def keep_results(found: Results) -> None:
        save_results(found, out / RESULTS)
        kept[:] = [out / RESULTS]

    def report(line: str) -> None:
        click.echo(line, err=True)

    try:
        return run_comparison(asked, work.resolve(), shlex.join(command), alone, report, keep_results, before, deadline)
    except BaseException:
        if kept:
            report(f"{kept[0]} has what was measured until now; `dsc-serve bench report {out}` writes its report")
        raise


def tell(results: Results, out: Path, ratios: Path | None, keep_ratios: bool) -> None:
    """Write the report, and say what was found."""
    from dsc_serve.bench.compare.findings import sentences
    from dsc_serve.bench.compare.pages import write_report
    from dsc_serve.bench.compare.ratios import keep, moved

    write_report(results, out)
    click.echo("\n".join([*sentences(results), f"{out / 'report.html'} has the whole report"]))
    if ratios is not None:
        click.echo("\n".join(moved(results, ratios)))
        if keep_ratios:
            keep(results, ratios)


@click.command("peer-model", context_settings={"show_default": True})
@click.argument("out", type=FOLDER)
@click.option("--form", type=click.Choice(["mixtral", "llama"]), default="mixtral", help="Architecture.")
@click.option("--preset", type=click.Choice(["paper", "large"]), default="paper", help="Sizes, as in init.")
@click.option("--seed", default=0, help="Seed of the weights.")
def peer_model_command(out: Path, form: str, preset: str, seed: int) -> None:
    """Write a model of random weights for other servers to OUT: as large as ours of a preset, with a tokenizer."""
    from dsc_serve.bench.compare.peer_model import write_peer_model

    count = write_peer_model(form, preset, out, seed)
    click.echo(f"{out}: {form}, {count:,} parameters")


@click.command("peer-adapters", context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=FOLDER, required=True, help="A folder of adapters, as in serve's --adapters.")
@click.option("--count", type=click.IntRange(1, 10_000), default=8, help="Adapters.")
@click.option("--rank", type=click.IntRange(1, 256), default=16, help="Of each.")
def peer_adapters_command(model: Path, out: Path, count: int, rank: int) -> None:
    """Write random LoRA adapters of all modules of MODEL to OUT, in PEFT's form, which other servers read as well."""
    from dsc_serve.bench.step.adapters import write_random
    from dsc_serve.files import CheckpointError
    from dsc_serve.model.checkpoint import open_source

    try:
        names = write_random(open_source(model), out, count, rank)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {names[0]} to {names[-1]}")
