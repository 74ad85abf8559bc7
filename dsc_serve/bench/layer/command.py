"""`dsc-serve bench layer`: the layer benchmark on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dsc_serve.output_file import OUTPUT_FILE

MIXTURES = ("olmoe", "granite", "qwen")
CONFIGS = ("paper", "large", *MIXTURES, "tiny")


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Whole numbers separated by commas."""
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,4,16", ctx, param) from None


@click.command("layer", context_settings={"show_default": True})
@click.option(
    "--config", type=click.Choice(CONFIGS), default="paper", help="Sizes: a preset of init, or tiny for tests."
)
@click.option("--dtype", type=click.Choice(["bf16", "float32"]), default="bf16", help="Weights and activations.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default="all cores", help="Compute threads.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Run here.")
@click.option(
    "--batches",
    callback=numbers,
    metavar="LIST",
    show_default="1,4,16,64,256,1024,4096, or 1,16 with --sweep",
    help="Tokens in a batch, separated by commas.",
)
@click.option("--repeats", type=click.IntRange(1), default=30, help="Samples per system, at most.")
@click.option("--seconds", default=20.0, help="Time per batch size (and point of a sweep), about.")
@click.option(
    "--layers",
    type=click.IntRange(1),
    show_default="8 (2 of a mixture of many experts), or more where the last-level cache holds those",
    help="Layers of different weights that each system rotates through.",
)
@click.option(
    "--sweep", type=click.Choice(["atoms", "picks"]), help="Measure DSC's cost against M, or against K, instead."
)
@click.option("--seed", default=0, help="Seed of weights, inputs and order.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write the result to this file.")
@click.option("--plot", "plot_file", type=OUTPUT_FILE, help="Also draw the times as SVG into this file.")
def layer_command(sweep: str | None, json_file: Path | None, plot_file: Path | None, **options: Any) -> None:
    """Measure one FFN layer of DSC, MoE, a mixture of LoRAs and a dense FFN, side by side on this machine.

    Sizes are equal in active parameters (the dense one: in total parameters, as in the paper); at those of a mixture
    that people run, olmoe, granite or qwen, there are the mixture and a DSC of equal total. Every system's output
    is first compared with a float64 reference; a wrong one gets no time. Ends with status 1 when any is wrong. Beside
    such a mixture the native one of the paper's sizes is measured too: how near each comes to its roofline.
    """
    from dsc_serve.bench.layer.beside import Beside, beside_paper, format_beside
    from dsc_serve.bench.layer.measurement import BATCHES, LayerBench, LayerBenchError, LayerResult, run_layer_bench
    from dsc_serve.bench.layer.sweep import SWEEP_BATCHES, run_sweep
    from dsc_serve.bench.layer.table import chart_layers, chart_sweep, format_layers, format_sweep

    if sweep and options["config"] in MIXTURES:
        raise click.ClickException(f"--sweep is of the paper's layer; --config {options['config']} is a mixture")
    options["batches"] = options["batches"] or (SWEEP_BATCHES if sweep else BATCHES)
    command = command_line(sweep, options)
    try:
        bench = LayerBench(**options)
    except LayerBenchError as error:
        raise click.ClickException(str(error)) from None

    def report(line: str) -> None:
        click.echo(line, err=True)

    result: LayerResult[Any]
    draw: Callable[[], str]
    beside: Beside | None = None
    if sweep:
        result = run_sweep(bench, sweep, command, report)
        table, draw = format_sweep(result), lambda: chart_sweep(result, sweep)
    else:
        result = run_layer_bench(bench, command, report)
        table, draw = format_layers(result), lambda: chart_layers(result)
        if options["config"] in MIXTURES:
            beside = beside_paper(result, bench, report)
            table += "\n" + format_beside(beside, options["config"])
    click.echo(table)
    if json_file is not None:
        written = result.to_dict() if beside is None else {**result.to_dict(), "beside": beside.to_dict()}
        text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    if plot_file is not None and any(row.us for row in result.rows):
        plot_file.write_text(draw(), encoding="utf-8")
    if any(row.wrong for row in (*result.rows, *(beside.paper.rows if beside else ()))):
        raise SystemExit(1)


def command_line(sweep: str | None, options: dict[str, Any]) -> str:
    """The command that measures the same again, without the files it wrote."""
    words = ["dsc-serve bench layer", *([f"--sweep {sweep}"] if sweep else [])]
    for name, value in options.items():
        if value is not None and not (name == "threads" and not value):
            words.append(f"--{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)
