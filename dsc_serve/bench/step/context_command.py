"""`dsc-serve bench context`: what context costs a model, by the form of its keys and values."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.output_file import OUTPUT_FILE, TEXT_FILE


@click.command("context", context_settings={"show_default": True})
@click.argument("models", nargs=-1, required=True)
@click.option("--context", type=click.IntRange(1), default=4096, help="Tokens that each stream has before it.")
@click.option("--streams", type=click.IntRange(1), default=1, help="Requests at a time.")
@click.option(
    "--kv-dtype", "kv_dtypes", type=click.Choice(["auto", "int8"]), multiple=True, default=("auto",),
    help="Each of MODELS with each of these.",
)  # fmt: skip
@click.option("--text", type=TEXT_FILE, help="Also its bits per byte, in windows of --context tokens.")
@click.option("--text-tokens", type=click.IntRange(2), default=16384, help="Of the text, from its beginning.")
@click.option("--steps", type=click.IntRange(1), default=20, help="Of each system and round.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Of which medians are taken.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def context_command(
    models: tuple[str, ...],
    context: int,
    streams: int,
    kv_dtypes: tuple[str, ...],
    text: Path | None,
    text_tokens: int,
    steps: int,
    rounds: int,
    dtype: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measure steps of MODELS whose streams have a long context before them, all in this process and in turn.

    Tells the bytes of keys and values of a token, what a stream's context takes, and times beside those of the first.
    """
    for model in models:
        resolve_model(model)
    from dsc_serve.bench.step import quality
    from dsc_serve.bench.step.context import System, format_rows, measure
    from dsc_serve.bench.step.engine_command import machine
    from dsc_serve.bench.step.streams import needed_tokens
    from dsc_serve.engine.preparation import prepare_model

    systems = []
    for model in models:
        config = EngineConfig(model=model, threads=threads, dtype=dtype)  # type: ignore[arg-type]  # by the option
        prepared = prepare_model(config)
        needed, most = needed_tokens(context, streams, steps * rounds), prepared.config.max_position_embeddings
        if needed > most:
            message = f"--context, --steps and --rounds need {needed} tokens; the context of {model} is {most}"
            raise click.ClickException(message)
        for kv_dtype in kv_dtypes:
            own = msgspec.structs.replace(config, kv_dtype=kv_dtype)
            bits = None
            if text is not None:
                try:
                    bits = quality.bits_per_byte(own, text.read_text("utf-8"), text_tokens, context)
                except (OSError, UnicodeError, quality.TextError) as error:
                    raise click.ClickException(f"--text: {error}") from error
            systems.append(System(Path(model).name, prepared, own, bits))
    found: dict[str, object] = {
        "command": as_typed("context"),
        "machine": machine(systems[0].model),
        "rows": (rows := measure(systems, streams, context, steps, rounds)),
    }
    click.echo(format_rows(rows))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
