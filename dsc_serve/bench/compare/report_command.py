"""`dsc-serve bench report` on the command line."""

from __future__ import annotations

from pathlib import Path

import click

RESULTS = "results.json"
SHOWN = "to-baseline", "throughput"
FILE = click.Path(dir_okay=False, path_type=Path)
TITLES = {  # of documents that are made for what all results say
    "summary": "Systems beside each other",
    "answers": "What was measured",
    "dsc-moe": "DSC beside a mixture of experts, all rounds",
}


@click.command("report", context_settings={"show_default": True})
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--into", type=FILE, help="Put tables into this Markdown file, between its marks for --name.")
@click.option("--name", help="Whose place in the file it is, such as paper.")
@click.option("--chart", "charts", multiple=True, default=SHOWN, help="Charts to put in as well.")
def report_command(folder: Path, into: Path | None, name: str | None, charts: tuple[str, ...]) -> None:
    """Write the report of FOLDER, which `bench compare` filled, again: as HTML there, or into a document.

    With --into, the tables replace what stands between the lines "<!-- NAME: begin -->" and "<!-- NAME: end -->"; a
    document that is not there yet is made. Charts are written as SVG into the folder plots beside it, and the
    results as NAME.results.json, so that the tables can be made again and audited. FOLDER may also be a file that
    another `bench` command wrote by --json, and a folder of several comparisons, such as mixture's: each gets its page
    beside the document, which links to them.

    Where FOLDER holds such pages and their results, as docs/results does, what all of them say is put into a document,
    by --name: summary (a row for each pair of systems), answers (a line for each page), dsc-moe (DSC beside MoE, all
    rounds).
    """
    from dsc_serve.bench.compare.overview import OVERVIEWS, overview
    from dsc_serve.bench.compare.pages import page_of, write_page, write_part, write_reports

    if into is not None and not name:
        raise click.ClickException("--into needs --name")
    raw = folder / RESULTS if folder.is_dir() else folder
    parts = {} if raw.is_file() else {file.parent.name: file for file in sorted(folder.glob(f"*/{RESULTS}"))}
    if into is None:
        click.echo(write_reports(folder, raw, parts))
        return
    assert name
    if name in OVERVIEWS:
        write_part(into, name, overview(name, folder, into), f"# {TITLES[name]}")
        return
    for part, file in parts.items():
        write_page(into.with_name(f"{part}.md"), part, page_of(file, part, charts), file.read_bytes())
    if parts:
        head = f"# {name}, part by part\n\n`dsc-serve bench compare {name} --out runs/{name}` measures them."
        write_part(into, name, overview("answers", into.parent, into, tuple(parts)), head)
    else:
        write_page(into, name, page_of(raw, name, charts), raw.read_bytes())
