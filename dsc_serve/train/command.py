"""The commands that make and measure models: train, study, evaluate, prune, merge-experts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from dsc_serve.config import DTYPES, EMBEDDED_MODEL, resolve_model
from dsc_serve.output_file import OUTPUT_FILE

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
ANY = click.Path(path_type=Path)
PRESETS = ("embedded", "paper", "smoke", "study")
STUDY_GIVES = {
    "run.seed": "--seeds gives it",
    "run.evaluate_steps": "the study looks ten times a run",
    "budget.kind": "the study runs every kind",
    "budget.k": "--depths gives it for DSC",
}

text_option = click.option(
    "--text", "texts", type=ANY, multiple=True, help="Text file (.txt, .txt.xz) or a folder of them; repeatable."
)
limit_option = click.option(
    "--time-limit", default=None, metavar="TIME", help="Such as 2.5h, 150m or 9000: time for everything."
)
set_option = click.option(
    "--set", "changes", multiple=True, metavar="SECTION.FIELD=VALUE", help="Any setting, e.g. run.seed=1; repeatable."
)


@click.command(short_help="Train a model from text.")
@click.argument("config", type=FILE, required=False)
@click.option("--preset", type=click.Choice(PRESETS), help="Settings that come with the package, instead of CONFIG.")
@text_option
@click.option("--out", type=FOLDER, required=True, help="The run's folder; an unfinished run in it goes on.")
@limit_option
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Train here.")
@set_option
def train_command(
    config: Path | None,
    preset: str | None,
    texts: tuple[Path, ...],
    out: Path,
    time_limit: str | None,
    device: str,
    changes: tuple[str, ...],
) -> None:
    """Train a model as CONFIG, a TOML file, or a preset says, and export it to OUT/model in the serving form.

    The same command on the same folder goes on from the last checkpoint; at a fixed number of steps it then ends with
    the same weights, bit for bit, as a run that was never stopped. With --time-limit the schedule follows the clock
    over all starts, so that the run always ends with its full decay.

    \b
    Presets:
      embedded  the model that comes with the package; meant for --time-limit 2.5h on two cores
      paper     the paper's sizes and recipe: 35 M parameters, 2,000 steps of 32,768 tokens
      study     3.75 M parameters, 3 M active: the frame of `dsc-serve study`
      smoke     seconds; without --text it trains on made-up sentences
    """
    from dsc_serve.train.card import card, samples
    from dsc_serve.train.clock import seconds
    from dsc_serve.train.corpus import text_files
    from dsc_serve.train.sentences import paragraphs
    from dsc_serve.train.settings import load_settings, preset_file
    from dsc_serve.train.trainer import MODEL, Trainer

    if (config is None) == (preset is None):
        raise click.UsageError("give either CONFIG, a TOML file, or --preset")
    settings = load_settings(config or preset_file(preset or ""), changes)
    named = list(texts)
    if not named and settings.data.sentences:
        made = out / "sentences.txt"
        out.mkdir(parents=True, exist_ok=True)
        made.write_text(paragraphs(settings.data.sentences), "utf8")
        named = [made]
    limit = None if time_limit is None else seconds(time_limit)
    summary = Trainer(settings, text_files(named), out, device, limit).run()
    assert summary is not None
    (out / "card.md").write_text(card(summary, settings, samples(out / MODEL, settings.run.samples)), "utf8")
    click.echo(
        f"{out / MODEL}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens trained, held-out loss "
        f"{summary['held_out_loss']:.4f} nats/token, {summary['held_out_bits_per_byte']:.4f} bits/byte"
    )
    if summary["dead"]:
        click.echo(f"never picked on the held-out text, per layer: {', '.join(map(str, summary['dead']))}")


@click.command(short_help="Compare the FFN kinds at equal active parameters.")
@text_option
@click.option("--out", type=FOLDER, required=True, help="The study's folder; an unfinished study in it goes on.")
@limit_option
@click.option("--seeds", default="0,1", show_default=True, help="Seeds, separated by commas.")
@click.option("--depths", default="1,4,16", show_default=True, help="K of the DSC runs, separated by commas.")
@click.option("--markdown", type=OUTPUT_FILE, help="Also write the results to this file.")
@set_option
def study_command(
    texts: tuple[Path, ...],
    out: Path,
    time_limit: str | None,
    seeds: str,
    depths: str,
    markdown: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Train DSC, MoE, a mixture of LoRAs and a dense FFN on the same tokens with every seed, and compare them.

    Sizes come from the paper's budget solver (preset `study`). With --time-limit the number of steps is planned from
    each kind's measured speed; what does not finish in time is named, not guessed.
    """
    from dsc_serve.train.clock import seconds
    from dsc_serve.train.corpus import text_files
    from dsc_serve.train.settings import MAX_SEED, load_settings, preset_file
    from dsc_serve.train.study import Study
    from dsc_serve.train.study_report import charts, table

    given = STUDY_GIVES | ({} if time_limit is None else {"schedule.steps": "--time-limit plans them"})
    for field in (change.partition("=")[0] for change in changes):
        if field in given:
            raise click.UsageError(f"--set {field}: {given[field]}")
    study = Study(
        load_settings(preset_file("study"), changes),
        text_files(texts),
        out,
        seeds=numbers("--seeds", seeds, 0, MAX_SEED),
        depths=numbers("--depths", depths, 1),
        time_limit=None if time_limit is None else seconds(time_limit),
        report=lambda line: click.echo(line, err=True),
    )
    result = study.run()
    words = ["dsc-serve study", *(f"--set {change}" for change in changes), f"--seeds {seeds} --depths {depths}"]
    if time_limit is not None:
        words.append(f"--time-limit {time_limit}")
    report = table(result, " ".join(words), time.strftime("%Y-%m-%d"))
    charts(out, result["runs"], out)
    (out / "results.md").write_text(report, "utf8")
    click.echo(report, nl=False)
    if markdown is not None:
        markdown.write_text(report, "utf8")
        charts(out, result["runs"], markdown.parent)


def numbers(option: str, text: str, least: int, most: int = 99_999) -> list[int]:
    """Different whole numbers separated by commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least or max(found) > most or len(set(found)) < len(found):
        raise click.UsageError(f"{option} is {text!r}; expected different numbers from {least} to {most:,}")
    return found


@click.command(short_help="Measure a text's loss under a model.")
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--text", "texts", type=ANY, multiple=True, required=True, help="Text file or folder; repeatable.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write the result to this file.")
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="auto", show_default=True, help="Compute in this dtype."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Run here.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Compute threads [default: all cores].")
@click.option("--kernels", default="auto", show_default=True, help="As in serve.")
def evaluate_command(
    model: str, texts: tuple[Path, ...], json_file: Path | None, dtype: str, device: str, threads: int, kernels: str
) -> None:
    """Loss of texts under MODEL through the serving engine: nats per token, perplexity and bits per byte.

    Total bits over total bytes, in windows of the model's whole context that do not overlap; a rest that fills no
    window is left out. The first token of a text is never predicted, and no mark stands before a window.
    """
    from dsc_serve.llm import LLM
    from dsc_serve.train.corpus import read_text, source_name, text_files
    from dsc_serve.train.evaluation import Evaluation, evaluate

    contents = {source_name(file): read_text(file) for file in text_files(texts)}
    found: dict[str, Evaluation] = {}
    with LLM(model, device, DTYPES[dtype], threads=threads, kernels=kernels, max_running=4) as llm:  # type: ignore[arg-type]
        for name, content in contents.items():
            found[name] = evaluate(llm, content, progress=True)
    total = sum(found.values(), Evaluation(0.0, 0, 0))
    result: dict[str, Any] = total.to_dict()
    if len(found) > 1:
        for name, own in found.items():
            click.echo(f"{name}: {own.loss:.4f} nats/token, {own.to_dict()['bits_per_byte']:.4f} bits/byte")
        result["texts"] = {name: own.to_dict() for name, own in found.items()}
    click.echo(
        f"{result['loss']:.4f} nats/token, perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.4f} "
        f"bits/byte over {result['tokens']:,} tokens"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", "utf8")


@click.command(short_help="Drop the atoms that a text never picks.")
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--calibration", type=FILE, required=True, help="Text whose picks decide which atoms stay.")
@click.option("--text", "texts", type=ANY, multiple=True, help="Measure the change of loss on these texts too.")
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
def prune_command(model: str, calibration: Path, texts: tuple[Path, ...], out: Path) -> None:
    """Write MODEL without the atoms that no token of the calibration text picks, and report the change of loss.

    All layers keep as many atoms as the layer that uses most of them.
    """
    from dsc_serve.train.corpus import read_text, source_name, text_files
    from dsc_serve.train.prune import prune

    measured = {f"{source_name(calibration)} (calibration)": read_text(calibration)}
    if texts:
        measured |= {source_name(file): read_text(file) for file in text_files(texts)}
    found = prune(resolve_model(model), read_text(calibration), measured, out)
    click.echo(f"atoms picked, per layer: {', '.join(map(str, found.live))} of {found.before}")
    click.echo(f"{out}: {found.after} atoms per layer")
    for name, (before, after) in found.losses.items():
        change = after.loss - before.loss
        click.echo(
            f"{name}: {before.loss:.5f} to {after.loss:.5f} nats/token ({change:+.2e}), {before.tokens:,} tokens"
        )


@click.command(short_help="Merge the experts of mixtures that say alike.")
@click.argument("model")
@click.option("--experts", type=click.IntRange(min=1), required=True, help="Experts that each mixture keeps.")
@click.option("--calibration", type=FILE, required=True, help="Text on which experts are compared.")
@click.option("--text", "texts", type=ANY, multiple=True, help="Measure the change of loss on these texts too.")
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
def merge_experts_command(model: str, experts: int, calibration: Path, texts: tuple[Path, ...], out: Path) -> None:
    """Write MODEL with fewer experts, and report the change of loss, per layer and in all.

    Experts whose outputs on the calibration text point the same way are merged in a subspace that they share.
    """
    from dsc_serve.train.corpus import read_text, source_name, text_files
    from dsc_serve.train.merge import merge_experts

    measured = {f"{source_name(calibration)} (calibration)": read_text(calibration)}
    if texts:
        measured |= {source_name(file): read_text(file) for file in text_files(texts)}
    found = merge_experts(resolve_model(model), experts, read_text(calibration), measured, out)
    first = next(iter(measured))
    for own in found.layers:
        merged = "; ".join(" + ".join(map(str, members)) for members in own.clusters if len(members) > 1)
        change = own.loss - found.before[first].loss
        click.echo(f"layer {own.layer}: experts {merged} merged, alone {change:+.5f} nats/token")
    click.echo(f"{out}: {found.experts[1]} of {found.experts[0]} experts per layer")
    for name, before in found.before.items():
        after, fewer = found.after[name].loss, found.dropped[name].loss
        click.echo(
            f"{name}: {before.loss:.5f} to {after:.5f} nats/token ({after - before.loss:+.5f}; with the least picked "
            f"dropped instead {fewer - before.loss:+.5f}), {before.tokens:,} tokens"
        )
