"""`dsc-serve bench forward`: the paper's measurement on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dsc_serve.output_file import OUTPUT_FILE


@click.command("forward", context_settings={"show_default": True})
@click.option("--preset", type=click.Choice(["paper", "large"]), default="paper", help="Sizes, as in init.")
@click.option("--sequences", type=click.IntRange(1), default=16, help="Sequences of the batch.")
@click.option("--length", type=click.IntRange(1, 256), default=256, help="Tokens of each.")
@click.option("--repeats", type=click.IntRange(1), default=50, help="Forwards of each system; times are their means.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default="all cores", help="Compute threads.")
@click.option("--seed", default=0, help="Seed of weights, tokens and order.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
@click.option(
    "--into",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also put the table into this Markdown file, between its marks for forward, and the JSON beside it.",
)
def forward_command(json_file: Path | None, into: Path | None, **options: object) -> None:
    """Measure the forward pass of whole models over one batch: dense, MoE (ours, and as a loop) and DSC.

    The paper's own measurement: 16 sequences of 256 tokens, bfloat16, logits of every position, the mean of 50.
    """
    from dsc_serve.bench.compare.elements import put_into
    from dsc_serve.bench.compare.pages import page_of, write_page
    from dsc_serve.bench.step.forward import ForwardBench, format_forward, run_forward

    if into is not None and into.is_file():
        put_into(into.read_text(encoding="utf-8"), "forward", "")  # its place is looked for before the measurement
    bench = ForwardBench(**options)  # type: ignore[arg-type]
    result = run_forward(bench, lambda line: click.echo(line, err=True))
    table = format_forward(result)
    click.echo(table)
    whole = json.dumps(result.to_dict(), indent=2) + "\n"
    if json_file is not None:
        json_file.write_text(whole, encoding="utf-8")
    if into is not None:
        raw = into.with_name("forward.results.json")
        raw.write_text(whole, encoding="utf-8")
        write_page(into, "forward", page_of(raw, "forward"), raw.read_bytes())
    if any(row.wrong for row in result.rows):
        raise SystemExit(1)
