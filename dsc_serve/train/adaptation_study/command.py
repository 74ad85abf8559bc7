"""`dsc-serve adapter study`: kinds of adapters compared on the same texts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from dsc_serve.config import DTYPES, resolve_model
from dsc_serve.output_file import OUTPUT_FILE
from dsc_serve.train.command import text_option

FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(1)
ALL = "lora,lora-xs,shared,dsc,mixed"


@click.command("study", short_help="Compare kinds of adapters on the same texts.")
@click.option("--base", required=True, metavar="MODEL", help="The model that is adapted: a folder or a GGUF file.")
@text_option
@click.option("--out", type=FOLDER, required=True, help="The study's folder; an unfinished study in it goes on.")
@click.option("--time-limit", default=None, metavar="TIME", help="Such as 2h, 90m or 5400: of this start.")
@click.option("--tokens", type=COUNT, default=100_000, show_default=True, help="Each text is trained on.")
@click.option("--kinds", default=ALL, show_default=True, help="Which; more may be named at a later start.")
@click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Of LoRA and LoRA-XS.")
@click.option("--basis", type=click.IntRange(1, 4096), default=32, show_default=True, help="Rank that LoRAs share.")
@click.option("--atoms", type=COUNT, default=1024, show_default=True, help="Of the DSC branch, beside each MLP.")
@click.option("--picks", type=click.IntRange(1, 64), default=4, show_default=True, help="Of these, for each token.")
@click.option("--layers", default="", metavar="LIST", help="Of the DSC branch, e.g. 20-29 [default: all].")
@click.option("--windows", type=COUNT, default=24, show_default=True, help="Held-out ones of each text, at most.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="auto", show_default=True, help="Measure in this.")
@click.option("--markdown", type=OUTPUT_FILE, help="Also write the results into this file, between two lines.")
@click.option(
    "--set", "changes", multiple=True, metavar="[KIND.]FIELD=VALUE", help="Any setting of adapt's runs; repeatable."
)
def study_adapters_command(
    base: str,
    texts: tuple[Path, ...],
    out: Path,
    time_limit: str | None,
    tokens: int,
    kinds: str,
    rank: int,
    basis: int,
    atoms: int,
    picks: int,
    layers: str,
    windows: int,
    dtype: str,
    markdown: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Train adapters of MODEL of every kind for the same texts, one tenant each, and measure every tenant's adapter on
    every tenant's held-out text, through the serving engine.

    \b
    lora     LoRA, all tenants in the same steps
    lora-xs  cores on the singular vectors of the base's weights
    shared   the LoRAs on a basis that `adapter share` finds in them
    dsc      tenants of a DSC branch, bank and tenants trained together
    mixed    one LoRA of all texts: what of a gain is general

    Beside those that take fewer bytes than a LoRA stands a LoRA of a rank with about as many. The same command on the
    same folder goes on where it stopped, within a stage too; a stage that would not end within --time-limit is not
    begun, and training is cut at a checkpoint. OUT/results.json and OUT/results.md tell what there is so far.
    """
    from dsc_serve.train.adaptation_study.plan import StudyOptions, kinds_of
    from dsc_serve.train.adaptation_study.report import check_document, report, write_into
    from dsc_serve.train.adaptation_study.results import results
    from dsc_serve.train.adaptation_study.study import AdaptationStudy
    from dsc_serve.train.checkpoint import write_whole
    from dsc_serve.train.clock import seconds
    from dsc_serve.train.corpus import text_files

    if markdown is not None:
        check_document(markdown)
    options = StudyOptions(tokens, rank, basis, atoms, picks, layers, windows, dtype, changes)
    study = AdaptationStudy(
        resolve_model(base),
        Path(base).name,
        text_files(texts),
        out,
        options,
        kinds_of(kinds),
        time_limit=None if time_limit is None else seconds(time_limit),
        report=lambda line: click.echo(line, err=True),
    )
    missing = study.run()
    words = ["dsc-serve adapter study --base", shlex.quote(Path(base).name), "--text FOLDER --out RUNS"]
    words += [f"--tokens {tokens} --kinds {kinds} --rank {rank} --basis {basis} --atoms {atoms} --picks {picks}"]
    words += [f"--layers {layers}"] if layers else []
    words += [f"--windows {windows} --dtype {dtype}", *(f"--set {change}" for change in changes)]
    found = results(study, missing, " ".join(words))
    write_whole(out / "results.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    text = report(found)
    write_whole(out / "results.md", text)
    if markdown is not None:
        write_into(markdown, text)
    click.echo(text, nl=False)
    if missing:
        click.echo(f"{len(missing)} stages are left; the same command goes on", err=True)
