"""The commands of adapters: look into one, and train some."""

from __future__ import annotations

from pathlib import Path

import click

from dsc_serve.config import resolve_model
from dsc_serve.train.command import limit_option, text_option
from dsc_serve.train.share_command import share_command

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group("adapter", short_help="Look into an adapter; let several share a basis.")
def adapter_group() -> None:
    """Look into an adapter, or let several share a basis."""


adapter_group.add_command(share_command)


@adapter_group.command("inspect", short_help="Print what an adapter changes, and how much.")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--base", default=None, metavar="MODEL", help="Also check that it fits this model, as serve would.")
@click.option(
    "--atoms", type=click.IntRange(1), default=None, help="Tell what keeping so many atoms a module leaves out."
)
@click.option("--out", type=FOLDER, default=None, help="With --atoms: write the adapter of these atoms here.")
def inspect_command(folder: Path, base: str | None, atoms: int | None, out: Path | None) -> None:
    """Print the modules, ranks, bytes and spectral norms of the adapter in DIR, a folder of PEFT's form, or of cores on
    the basis beside it.

    An update of rank r is the sum of r atoms, its singular vectors with their singular values; those left out cost
    exactly the largest of them in the spectral norm.
    """
    from dsc_serve.files import CheckpointError
    from dsc_serve.model.adapter_kinds import read_adapter
    from dsc_serve.model.checkpoint import open_source
    from dsc_serve.model.cores.inspection import InspectedCores, inspect_cores, report_cores
    from dsc_serve.model.cores.reader import holds_cores
    from dsc_serve.model.peft import inspection

    if out is not None and atoms is None:
        raise click.UsageError("--out is given without --atoms; it takes both")
    if out is not None and out.exists() and any(out.iterdir()):
        raise click.UsageError(f"--out {out} holds something already; name an empty folder")
    try:
        found = inspect_cores(folder) if holds_cores(folder) else inspection.inspect_adapter(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {str(error).replace(f'{folder}/', '')}") from None
    forms = inspection.canonical_forms(found.modules)
    if isinstance(found, InspectedCores):
        lines = report_cores(found, forms, atoms)
    else:
        lines = inspection.report(found, forms, atoms)
    for line in lines:
        click.echo(line)
    if base is not None:
        source = open_source(resolve_model(base))
        fitted = read_adapter(folder, source.config, source.origin)
        click.echo(f"fits      {base}: {len(fitted.modules)} modules of it, digest {fitted.digest}")
    if out is not None and atoms is not None:
        inspection.write_kept(found.base, found.fan_in_fan_out, forms, atoms, out)
        click.echo(f"written   {out}: {atoms} atoms of each module")


@click.command("adapt", short_help="Train adapters of a model from texts.")
@click.option(
    "--kind", type=click.Choice(["lora", "lora-xs"]), default="lora", show_default=True, help="What is trained."
)
@click.option("--base", required=True, metavar="MODEL", help="The model that stays as it is.")
@text_option
@click.option("--out", type=FOLDER, required=True, help="The run's folder; an unfinished run in it goes on.")
@limit_option
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Any setting, e.g. rank=8 or steps=500; repeatable."
)
def adapt_command(
    kind: str, base: str, texts: tuple[Path, ...], out: Path, time_limit: str | None, changes: tuple[str, ...]
) -> None:
    """Train an adapter of MODEL for each text, all in the same steps, and write them to OUT/adapters, where
    `serve MODEL --adapters OUT/adapters` finds them.

    lora: in PEFT's form. lora-xs: a core for each on a basis that all share, the first singular vectors of the base's
    own weights (arXiv 2405.17604).

    The base is frozen. The same command on the same folder goes on from the last checkpoint; at a fixed number of steps
    it then ends with the same numbers, bit for bit, as a run that was never stopped. Each adapter has a gradient, a
    clipping and an order of windows of its own: who is trained beside it does not matter.
    """
    from dsc_serve.train.adapt.kinds import KINDS
    from dsc_serve.train.adapt.settings import settings_of
    from dsc_serve.train.adapt.trainer import ADAPTERS
    from dsc_serve.train.clock import seconds
    from dsc_serve.train.corpus import text_files

    limit = None if time_limit is None else seconds(time_limit)
    own = KINDS[kind]
    settings = settings_of(own.settings, changes)
    summary = own.trainer(settings, resolve_model(base), text_files(texts), out, base, limit).run()
    assert summary is not None
    for name, bits in summary["bits_per_byte"].items():
        click.echo(f"{out / ADAPTERS / name}: held out {bits['base']:.4f} to {bits['adapted']:.4f} bits/byte")
    click.echo(f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['dtype']}")
