"""`dsc-serve bench decide`: what to serve at sizes that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsc_serve.bench.layer.command import numbers
from dsc_serve.output_file import OUTPUT_FILE

if TYPE_CHECKING:
    from dsc_serve.bench.decide.decide_page import Decision
    from dsc_serve.bench.decide.measured_machine import MeasuredMachine

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
RESULTS = Path("docs/results")
KEPT = RESULTS / "decide.results.json"  # of --into docs/results/decide.md: it answers where no machine is given
MEASURING = ("measure", "minutes", "sizes", "systems", "weights", "threads")  # options that measure; others answer


@click.command("decide", context_settings={"show_default": True})
@click.option("--params", "params_text", metavar="COUNT", help="Parameters in all, such as 400M.")
@click.option("--active", "active_text", metavar="COUNT", help="Parameters that a token uses, such as 250M.")
@click.option("--streams", callback=numbers, metavar="LIST", default="1,8,32", help="Requests at once.")
@click.option(
    "--machine",
    "machine_file",
    type=FILE,
    help="What --measure wrote.  [default: what docs/results/decide.results.json keeps]",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=48, help="Length of each prompt.")
@click.option("--output-tokens", type=click.IntRange(2), default=64, help="Tokens of each answer.")
@click.option("--acceptance", type=click.FloatRange(0, 1), default=0.7, help="Chance that a draft is right.")
@click.option("--vocab", type=click.IntRange(256), default=50304, help="Words.")
@click.option("--layers", type=click.IntRange(1), help="Instead of a frame of usual shape; with --width.")
@click.option("--width", type=click.IntRange(64), help="d, a multiple of 64; with --layers.")
@click.option("--results", type=FOLDER, default=RESULTS, help="Comparisons to check the model with.")
@click.option("--out", type=FOLDER, help="Also write report.html and the chart here.")
@click.option(
    "--into",
    type=FILE,
    help="Also put the tables into this Markdown file, between its marks, and their data beside it.",
)
@click.option("--measure", type=OUTPUT_FILE, help="Measure this machine into this file; what it has is kept.")
@click.option("--minutes", type=click.FloatRange(0), default=0.0, help="Of --measure; begin nothing after. 0: all.")
@click.option("--size", "sizes", multiple=True, help="Of --measure: only this size; may be repeated.")
@click.option("--system", "systems", multiple=True, help="Of --measure: only this kind; may be repeated.")
@click.option("--weights", multiple=True, help="Of --measure: only this form; may be repeated.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Of --measure, as in serve.")
@click.pass_context
def decide_command(
    ctx: click.Context,
    params_text: str | None,
    active_text: str | None,
    streams: tuple[int, ...],
    machine_file: Path | None,
    prompt_tokens: int,
    output_tokens: int,
    acceptance: float,
    vocab: int,
    layers: int | None,
    width: int | None,
    results: Path,
    out: Path | None,
    into: Path | None,
    measure: Path | None,
    minutes: float,
    sizes: tuple[str, ...],
    systems: tuple[str, ...],
    weights: tuple[str, ...],
    threads: int,
) -> None:
    """What DSC, a mixture of experts, one of LoRAs and a dense model of a size are expected to serve.

    First `--measure FILE` (a few minutes, machine idle; the same command goes on where it was ended), then
    `--params 400M --active 250M --machine FILE`. A law of step times is fitted to the measured steps: every figure is a
    model's, and its errors are told.
    """
    from dsc_serve.bench.decide.sizes import DecideError

    try:
        for option in ctx.command.params:
            given = ctx.get_parameter_source(option.name or "") is not click.core.ParameterSource.DEFAULT
            if given and measure is not None and option.name not in MEASURING:
                raise DecideError(f"{option.opts[0]} cannot be used with --measure, which answers nothing yet")
            if given and measure is None and option.name in MEASURING:
                raise DecideError(f"{option.opts[0]} is of --measure alone")
        if measure is not None:
            measure_here(measure, minutes, sizes, systems, weights, threads)
            return
        if params_text is None or active_text is None:
            raise DecideError(f"--{'params' if params_text is None else 'active'} is missing, such as 400M")
        decision = decide(
            machine_file,
            params_text,
            active_text,
            (layers, width, vocab),
            streams=tuple(streams),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            acceptance=acceptance,
            results=results,
        )
        tell(decision, out, into)
    except DecideError as error:
        raise click.ClickException(str(error)) from None


def measure_here(
    file: Path, minutes: float, sizes: tuple[str, ...], systems: tuple[str, ...], weights: tuple[str, ...], threads: int
) -> None:
    """Raises DecideError."""
    from dsc_serve.bench.decide.measuring import AskedMachine, measure_machine
    from dsc_serve.bench.decide.sizes import MEASURED_SIZES, DecideError
    from dsc_serve.bench.decide.step_terms import SYSTEMS, WEIGHTS

    for option, given, known in (
        ("--size", sizes, tuple(MEASURED_SIZES)),
        ("--system", systems, tuple(SYSTEMS)),
        ("--weights", weights, WEIGHTS),
    ):
        for name in given:
            if name not in known:
                raise DecideError(f"{option} is {name!r}; it must be one of {', '.join(known)}")
    asked = AskedMachine(
        sizes={name: MEASURED_SIZES[name] for name in sizes or MEASURED_SIZES},
        systems=systems or tuple(SYSTEMS),
        weights=weights or WEIGHTS,
        threads=threads,
        minutes=minutes,
    )
    measured, whole = measure_machine(asked, file, lambda line: click.echo(line, err=True))
    click.echo(f"{file} has {len(measured.steps)} kinds of steps")
    if not whole:
        click.echo(f"{minutes:g} minutes are over; the same command goes on")


def machine_of(file: Path | None) -> MeasuredMachine:
    """Raises DecideError."""
    from dsc_serve.bench.decide.decide_page import load_decision
    from dsc_serve.bench.decide.measured_machine import load_machine
    from dsc_serve.bench.decide.sizes import DecideError

    if file is not None:
        measured = load_machine(file)
    elif KEPT.is_file():
        measured = load_decision(KEPT).measured
    else:
        raise DecideError("no machine: `dsc-serve bench decide --measure FILE` first, then --machine FILE")
    if not measured.steps:
        raise DecideError(f"{file or KEPT} has no steps; `dsc-serve bench decide --measure FILE` makes one that has")
    return measured


def decide(
    machine_file: Path | None,
    params_text: str,
    active_text: str,
    shape: tuple[int | None, int | None, int],
    *,
    streams: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int,
    acceptance: float,
    results: Path,
) -> Decision:
    """shape: layers, width, vocabulary. Raises DecideError."""
    from dsc_serve.bench.decide.answers import ClosedLoad, expect_all
    from dsc_serve.bench.decide.checked import checked_figures
    from dsc_serve.bench.decide.cost_law import fit, fit_errors, held_out_errors
    from dsc_serve.bench.decide.decide_page import Decision
    from dsc_serve.bench.decide.sizes import DecideError, frame_for, parameters

    if min(streams) < 1:
        raise DecideError(f"--streams is {min(streams)}; it must be at least 1")
    total, active = parameters("--params", params_text), parameters("--active", active_text)
    layers, width, vocab = shape
    frame = frame_for(total, active, layers, width, vocab, max(256, prompt_tokens + output_tokens))
    measured = machine_of(machine_file)
    load = ClosedLoad(
        streams=tuple(sorted(set(streams))),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        acceptance=acceptance,
    )
    laws = {weights: fit(measured, weights) for weights in measured.weights()}
    checked, passed_over = checked_figures(results, laws, measured.machine)
    return Decision(
        frame=frame,
        load=load,
        measured=measured,
        figures=expect_all(laws, frame, load),
        errors={weights: dict(fit_errors(measured, weights, law)) for weights, law in laws.items()},
        held_out={weights: dict(held_out_errors(measured, weights)) for weights in laws},
        checked=checked,
        passed_over=passed_over,
    )


def tell(decision: Decision, out: Path | None, into: Path | None) -> None:
    """Print the tables, and write page, chart and document where they are asked for. Raises ComparisonError."""
    from dsc_serve.bench.compare.elements import markdown_of, page
    from dsc_serve.bench.compare.pages import write_page
    from dsc_serve.bench.decide.decide_page import NAME, chart, elements, encoded, measured_page, title

    made = elements(decision)
    click.echo(f"{title(decision)}\n\n{markdown_of(made)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page(title(decision), made), encoding="utf-8")
        (out / "decide.svg").write_text(chart(decision).svg, encoding="utf-8")
    if into is not None:
        write_page(into, NAME, measured_page(decision), encoded(decision))
