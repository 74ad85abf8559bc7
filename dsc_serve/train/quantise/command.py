"""The command that writes a checkpoint in 4 and 8 bits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dsc_serve.config import resolve_model
from dsc_serve.output_file import OUTPUT_FILE

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
HELD_OUT = 0.1  # of a calibration text, to measure on where no other text is given
MOST_SHOWN = 8


@click.command(short_help="Write a model in 4 or 8 bits.")
@click.argument("model")
@click.option("--weights", type=click.Choice(["int8", "int4"]), required=True, help="As in serve.")
@click.option("--keep", default="", help="Exceptions by parts, as in serve.")
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
@click.option("--calibration", type=FILE, help="Text by which rounding errors are fed back.")
@click.option("--tokens", type=click.IntRange(512), default=16384, show_default=True, help="Of that text, at most.")
@click.option("--compensate", type=click.IntRange(1, 1024), metavar="RANK", help="Add what is lost in this rank.")
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, help="Held-out text; repeatable.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write the report, of all matrices, to this file.")
def quantize_command(
    model: str,
    weights: str,
    keep: str,
    out: Path,
    calibration: Path | None,
    tokens: int,
    compensate: int | None,
    texts: tuple[Path, ...],
    json_file: Path | None,
) -> None:
    """Write MODEL with weights in 4 or 8 bits, and report what that costs.

    Without --calibration weights are rounded to the nearest levels; with it by GPTQ, each column's error made up for by
    those that follow. --compensate RANK adds a product of that rank to each matrix, EoRA's, and reports the residual's
    norm, which bounds what is still wrong; of a matrix with both sides above 2048 it is estimated from below. Those of
    the largest errors are printed, --json has all. Bits per byte are measured on --text or, without it, on a tenth of
    the calibration text that nothing else sees, as served before and after.
    """
    from dsc_serve.text.tokenizer import Tokenizer
    from dsc_serve.train.corpus import read_text, source_name, split, text_files
    from dsc_serve.train.quantise.conversion import WINDOW, convert, spread
    from dsc_serve.train.quantise.measure import SAMPLE, layer_costs, served
    from dsc_serve.train.settings import TrainError

    path = resolve_model(model)
    tokenizer = Tokenizer.load(path)
    if tokenizer is None and (calibration is not None or texts):
        raise TrainError(f"{path}: has no tokenizer; a text needs one")
    measured = {source_name(file): read_text(file) for file in text_files(texts)} if texts else {}
    ids: list[int] = []
    if calibration is not None and tokenizer is not None:
        text = read_text(calibration)
        if not measured:
            kept, held = split(text, HELD_OUT)
            text = "\n\n".join("\n\n".join(part) for part in kept)
            measured = {source_name(calibration): "\n\n".join("\n\n".join(part) for part in held)}
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < 2:
            raise TrainError(f"{calibration}: has {len(ids)} tokens; a calibration needs at least 2")
    conversion = convert(path, out, weights, keep, ids, compensate or 0, tokens, progress=True)
    report: dict[str, Any] = {"matrices": [asdict(own) for own in conversion.matrices]}
    worst = sorted(conversion.matrices, key=lambda own: -own.error)
    click.echo(f"{out}: {len(worst)} matrices rounded; the largest errors of outputs, and ‖W − Ŵ‖ of ‖W‖:")
    for own in worst[:MOST_SHOWN]:
        told = ", from below" if own.estimated else ""
        norms = "" if own.residual is None else f", {own.residual:.3g} of {own.norm:.3g}{told}"
        click.echo(f"  {own.name}: {own.error:.2%}{norms} ({own.form})")
    if not measured:
        click.echo("give --text or --calibration to see bits per byte")
    else:
        before, after = (served(folder, measured) for folder in (path, out))
        bits = [own.to_dict()["bits_per_byte"] for own in (before, after)]
        change = bits[1] / bits[0] - 1
        click.echo(f"{bits[0]:.4f} to {bits[1]:.4f} bits/byte ({change:+.2%}) over {before.tokens:,} tokens")
        assert tokenizer is not None
        sample = tokenizer.encode("\n\n".join(measured.values()), add_special_tokens=False)
        context = conversion.config.max_position_embeddings
        costs = layer_costs(path, out, spread(sample, min(WINDOW, context), SAMPLE))
        click.echo("each layer rounded by itself: change of loss, and other picks with all rounded")
        for i, cost in enumerate(costs):
            click.echo(
                f"  layer {i}: {cost.loss:+.2%}" + ("" if cost.picks is None else f", {cost.picks:.2%} of picks")
            )
        report |= {"bits_per_byte": bits, "change": change, "layers": [asdict(cost) for cost in costs]}
    if json_file is not None:
        json_file.write_text(json.dumps(finite(report), indent=2, allow_nan=False) + "\n", "utf8")


def finite(content: Any) -> Any:
    """The same with null for numbers that JSON has no words for, which a model whose sums overflow gives."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
