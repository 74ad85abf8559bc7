"""`dsc-serve graft`: a pretrained model with an empty branch for tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from dsc_serve.config import resolve_model


@click.command("graft", short_help="Give a pretrained model an empty bank of atoms for tenants.")
@click.argument("base")
@click.option("--atoms", type=click.IntRange(1), required=True, help="Of the bank beside each MLP.")
@click.option("--picks", type=click.IntRange(1, 64), required=True, help="Of these, for each token.")
@click.option("--layers", default="", metavar="LIST", help="Beside which MLPs, e.g. 20-29 [default: all].")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the bank.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="bfloat16",
    show_default=True,
    help="What blocks of a GGUF file are dequantised to.",
)
def graft_command(
    base: str, atoms: int, picks: int, layers: str, out: Path, seed: int, dtype: Literal["float32", "bfloat16"]
) -> None:
    """Write BASE, a model with gated MLPs, with an empty DSC branch beside them: gamma is 0, so that its logits are the
    base's, bit for bit. `dsc-serve adapt --kind dsc` trains the bank and tenants of it.
    """
    import torch

    from dsc_serve.model.graft import branch_bytes, graft

    config = graft(resolve_model(base), out, atoms, picks, layers, seed, getattr(torch, dtype))
    bank, tenant = branch_bytes(config, 2)
    banks = sum(kind.ffn.kind == "dsc" for kind in config.layers)
    click.echo(
        f"{out}: an empty branch of {atoms} atoms, {picks} picked, beside {banks} of {len(config.layers)} MLPs; "
        f"{bank / 1e6:.1f} MB in bfloat16, {tenant / 1e6:.2f} MB a tenant"
    )
