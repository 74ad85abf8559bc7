"""`dsc-serve adapter share`: LoRAs to a basis that they share, and a core each."""

from __future__ import annotations

from pathlib import Path

import click

from dsc_serve.config import resolve_model

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("share", short_help="Let adapters share a basis, with a core each.")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option("--rank", type=click.IntRange(1, 4096), default=None, help="Directions of the basis, of each module.")
@click.option(
    "--onto", type=click.Path(path_type=Path), default=None, help="A basis that there is: its file, or its folder."
)
@click.option("--out", required=True, type=FOLDER, help="Folder for the basis and the adapters, as serve takes it.")
@click.option(
    "--max-error",
    type=click.FloatRange(0),
    default=None,
    help="Share of an update's spectral norm; where more would be left out a module keeps what it has.",
)
@click.option(
    "--whiten",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="TEXT",
    help="Find the basis by what updates do to the base's activations on this text; with --base.",
)
@click.option("--base", default=None, metavar="MODEL", help="With --whiten: the model that is adapted.")
def share_command(
    folders: tuple[Path, ...],
    rank: int | None,
    onto: Path | None,
    out: Path,
    max_error: float | None,
    whiten: Path | None,
    base: str | None,
) -> None:
    """Find a basis that the adapters in DIR..., folders of PEFT's form, share, and write it and a core for each.

    Of every module the basis has the directions in which all updates together are largest. What it leaves out of an
    update is told, exactly, in the spectral norm; an adapter that fits nowhere is refused.
    """
    from dsc_serve.model.cores.share import project, report, share

    if (rank is None) == (onto is None):
        raise click.UsageError("--rank makes a basis and --onto names one that there is; give one of the two")
    if (whiten is None) != (base is None):
        raise click.UsageError("--whiten and --base belong together; give both or none")
    if onto is not None:
        if whiten is not None:
            raise click.UsageError("--whiten is of a basis that is made; --onto names one that there is")
        found = project(folders, out, onto, max_error)
    elif rank is not None:
        measure = None
        if whiten is not None and base is not None:
            from dsc_serve.train.adapt.moments import second_moments

            text, model = whiten, resolve_model(base)
            measure = lambda: second_moments(model, text)  # noqa: E731
        found = share(folders, out, rank, max_error, measure)
    for line in report(found):
        click.echo(line)
