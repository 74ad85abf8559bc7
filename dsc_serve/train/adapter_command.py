"""The commands of adapters: look into one, and train some."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dsc_serve.config import resolve_model
from dsc_serve.train.adaptation_study.command import study_adapters_command
from dsc_serve.train.command import limit_option, text_option
from dsc_serve.train.share_command import share_command

FOLDER = click.Path(file_okay=False, path_type=Path)
TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group("adapter", short_help="Look into an adapter; let several share a basis; compare kinds.")
def adapter_group() -> None:
    """Look into an adapter, let several share a basis, or compare kinds of adapters on texts."""


adapter_group.add_command(share_command)
adapter_group.add_command(study_adapters_command)


@adapter_group.command("inspect", short_help="Print what an adapter changes, and how much.")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--base", default=None, metavar="MODEL", help="Also check that it fits this model, as serve would.")
@click.option(
    "--atoms", type=click.IntRange(1), default=None, help="Tell what keeping so many atoms a module leaves out."
)
@click.option("--out", type=FOLDER, default=None, help="With --atoms: write the adapter of these atoms here.")
@click.option("--text", type=TEXT, default=None, help="Of a tenant, with --base: tell what it picks on this text.")
@click.option("--beside", multiple=True, metavar="NAME", help="With --text: a tenant beside DIR; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect_command(
    folder: Path,
    base: str | None,
    atoms: int | None,
    out: Path | None,
    text: Path | None,
    beside: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print the modules, ranks, bytes and spectral norms of the adapter in DIR, a folder of PEFT's form, or of cores on
    the basis beside it; or of a tenant of a bank its certificate and, on a text, the atoms that it picks.

    An update of rank r is the sum of r atoms, its singular vectors with their singular values; those left out cost
    exactly the largest of them in the spectral norm.
    """
    from dsc_serve.files import CheckpointError
    from dsc_serve.model.adapter_kinds import read_adapter
    from dsc_serve.model.checkpoint import open_source
    from dsc_serve.model.cores.inspection import InspectedCores, content_of_cores, inspect_cores, report_cores
    from dsc_serve.model.cores.reader import holds_cores
    from dsc_serve.model.peft import inspection
    from dsc_serve.train.tenant_inspection import is_tenant

    if is_tenant(folder):
        if atoms is not None or out is not None:
            raise click.UsageError("--atoms and --out are for low-rank updates; DIR holds a tenant of a bank")
        inspect_tenants(folder, base, text, beside, as_json)
        return
    if text is not None or beside:
        raise click.UsageError("--text and --beside are for tenants of a bank; DIR holds none")
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
        content, lines = content_of_cores(found, forms, atoms), report_cores(found, forms, atoms)
    else:
        content, lines = inspection.content(found, forms, atoms), inspection.report(found, forms, atoms)
    if as_json:
        click.echo(json.dumps(content, indent=2))
    for line in () if as_json else lines:
        click.echo(line)
    if base is not None:
        source = open_source(resolve_model(base))
        fitted = read_adapter(folder, source.config, source.origin)
        click.echo(f"fits      {base}: {len(fitted.modules)} modules of it, digest {fitted.digest}", err=as_json)
    if out is not None and atoms is not None:
        inspection.write_kept(found.base, found.fan_in_fan_out, forms, atoms, out)
        click.echo(f"written   {out}: {atoms} atoms of each module", err=as_json)


def inspect_tenants(folder: Path, base: str | None, text: Path | None, beside: tuple[str, ...], as_json: bool) -> None:
    from dsc_serve.model.adapter_kinds import read_adapter
    from dsc_serve.model.checkpoint import open_source
    from dsc_serve.train.corpus import read_text
    from dsc_serve.train.tenant_inspection import inspect_tenant, picked_on, report

    if text is None and beside:
        raise click.UsageError("--beside is given without --text; it takes both")
    if text is not None and base is None:
        raise click.UsageError("--text is given without --base, the model that picks")
    told = [inspect_tenant(folder)]
    if base is not None:
        source = open_source(resolve_model(base))
        read_adapter(folder, source.config, source.origin)
    if base is not None and text is not None:
        told = picked_on(base, [folder, *(folder.parent / name for name in beside)], read_text(text))
    if as_json:
        click.echo(json.dumps(told[0] if len(told) == 1 else told, indent=2))
        return
    for line in report(told[0]):
        click.echo(line)
    if base is not None:
        click.echo(f"fits      {base}")


@click.command("adapt", short_help="Train adapters of a model from texts.")
@click.option(
    "--kind", type=click.Choice(["lora", "lora-xs", "dsc"]), default="lora", show_default=True, help="What is trained."
)
@click.option("--base", default=None, metavar="MODEL", help="The model that stays as it is.")
@click.option("--bank", default=None, metavar="MODEL", help="With --kind dsc, instead of --base: its bank stays, too.")
@text_option
@click.option("--out", type=FOLDER, required=True, help="The run's folder; an unfinished run in it goes on.")
@limit_option
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Any setting, e.g. rank=8 or steps=500; repeatable."
)
def adapt_command(
    kind: str,
    base: str | None,
    bank: str | None,
    texts: tuple[Path, ...],
    out: Path,
    time_limit: str | None,
    changes: tuple[str, ...],
) -> None:
    """Train an adapter of MODEL for each text, all in the same steps, and write them to OUT/adapters, where
    `serve MODEL --adapters OUT/adapters` finds them.

    lora: in PEFT's form. lora-xs: a core for each on a basis that all share, the first singular vectors of the base's
    own weights (arXiv 2405.17604).

    The base is frozen. The same command on the same folder goes on from the last checkpoint; at a fixed number of steps
    it then ends with the same numbers, bit for bit, as a run that was never stopped. Each adapter has a gradient, a
    clipping and an order of windows of its own: who is trained beside it does not matter.

    With --kind dsc MODEL has a bank of atoms, such as `graft` makes: the bank is trained with a tenant of it for each
    text, and OUT/model is the model with that bank, to be served with OUT/adapters. With --bank in place of --base the
    bank stays too, and the tenants alone are trained.
    """
    from dsc_serve.train.adapt.kinds import KINDS
    from dsc_serve.train.adapt.settings import settings_of
    from dsc_serve.train.adapt.trainer import ADAPTERS
    from dsc_serve.train.clock import seconds
    from dsc_serve.train.corpus import text_files

    limit = None if time_limit is None else seconds(time_limit)
    own = KINDS[kind]
    if (base is None) == (bank is None) or (bank is not None and own.of_bank is None):
        given = f"--kind is {kind}, --base {base or 'not given'}, --bank {bank or 'not given'}"
        raise click.UsageError(f"{given}; give --base, or with --kind dsc either --base or --bank")
    name, settings = base or bank or "", settings_of(own.settings, changes)
    trainer = own.trainer if own.of_bank is None or bank is None else own.of_bank
    summary = trainer(settings, resolve_model(name), text_files(texts), out, name, limit).run()
    assert summary is not None
    for name, bits in summary["bits_per_byte"].items():
        click.echo(f"{out / ADAPTERS / name}: held out {bits['base']:.4f} to {bits['adapted']:.4f} bits/byte")
    click.echo(f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['dtype']}")
