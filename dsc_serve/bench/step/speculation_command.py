"""`dsc-serve bench speculation`: what drafts are worth for a model on this machine."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EMBEDDED_MODEL, EngineConfig, resolve_model
from dsc_serve.output_file import OUTPUT_FILE


@click.command("speculation", context_settings={"show_default": True})
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 4, 8, 16), help="Requests at a time.")
@click.option(
    "--right", "rates", type=click.FloatRange(0, 1), multiple=True, default=(0.0, 0.5, 0.7, 0.9),
    help="How often a draft is right.",
)  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), default=48, help="Of each request, random ones.")
@click.option("--tokens", type=click.IntRange(2), default=128, help="Generated for each.")
@click.option("--temperature", type=click.FloatRange(0.01, 100), default=1.0, help="Of the continuations.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Each with and without drafts, in turn.")
@click.option("--max-drafts", type=click.IntRange(1, 64), default=7, help="As in serve.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def speculation_command(
    model: str,
    streams: tuple[int, ...],
    rates: tuple[float, ...],
    prompt_tokens: int,
    tokens: int,
    temperature: float,
    rounds: int,
    max_drafts: int,
    dtype: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measure MODEL with drafts that are right at given rates, each beside none, in this process.

    The drafts' source knows the continuation and errs at the rate, so that every model gets the same drafts and chooses
    its own widths; n-grams are tried too. Then how long steps take by the number of drafts.
    """
    resolve_model(model)
    from dsc_serve.bench.step.engine_command import machine
    from dsc_serve.bench.step.speculation import Task, compare, format_rows, format_widths, step_times
    from dsc_serve.engine.preparation import prepare_model

    config = EngineConfig(model=model, threads=threads, dtype=dtype, max_drafts=max_drafts)  # type: ignore[arg-type]
    loaded = prepare_model(config)
    context = loaded.config.max_position_embeddings
    if prompt_tokens + tokens > context:
        message = (
            f"--prompt-tokens and --tokens are {prompt_tokens + tokens} together; the model's context is {context}"
        )
        raise click.ClickException(message)
    found: dict[str, object] = {"command": as_typed("speculation"), "machine": machine(loaded)}
    tasks = [Task(count, prompt_tokens, tokens, temperature) for count in streams]
    rows = [row for task in tasks for row in compare(loaded, config, task, rates, rounds)]
    click.echo(format_rows(rows) + "\n")
    by_width = [row for task in tasks for row in step_times(loaded, config, task, max_drafts)]
    click.echo(format_widths(by_width))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(found | {"rows": rows, "widths": by_width})))
