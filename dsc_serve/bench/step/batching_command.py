"""`dsc-serve bench batching`: policies and grouping on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dsc_serve.bench.layer.command import numbers
from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EMBEDDED_MODEL, resolve_model
from dsc_serve.output_file import OUTPUT_FILE


@click.command("batching", context_settings={"show_default": True})
@click.argument("model", default=EMBEDDED_MODEL)
@click.option(
    "--text",
    "text_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to cut prompts from; needs a tokenizer.  [default: prompts are random token ids]",
)
@click.option("--requests", callback=numbers, metavar="LIST", default="8,32,128", help="Most requests at once.")
@click.option("--oversubscription", type=click.IntRange(1), default=4, help="Requests that arrive, times those.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=48, help="Length of each prompt.")
@click.option("--output-tokens", type=click.IntRange(2), default=48, help="Tokens to generate for each request.")
@click.option("--topics", type=click.IntRange(0), default=8, help="Places of the text that prompts come from; 0: all.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Of all variants in turn; medians are told.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default="all cores", help="Compute threads.")
@click.option("--seed", default=0, help="Seed of the prompts.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write the result to this file.")
def batching_command(model: str, text_file: Path | None, json_file: Path | None, **options: Any) -> None:
    """Form batches of MODEL's requests by each policy, grouped and not; tell what they share and how long they take.

    Also simulates, from the atoms really picked, a bank of which only a part lies in fast memory.
    """
    from dsc_serve.bench.step.batching import BatchingBench, format_batching, run_batching
    from dsc_serve.text.tokenizer import Tokenizer

    tokens = None
    if text_file is not None:
        tokenizer = Tokenizer.load(resolve_model(model))
        if tokenizer is None:
            raise click.ClickException(f"--text: {model} has no tokenizer; without --text, prompts are random ids")
        tokens = tokenizer.encode(text_file.read_text(encoding="utf-8"))
    result = run_batching(BatchingBench(model=model, **options), tokens, lambda line: click.echo(line, err=True))
    click.echo(format_batching(result))
    if json_file is not None:
        found = {"command": as_typed("batching"), **result.to_dict()}
        json_file.write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")
