"""`dsc-serve kernels calibrate`: the rates of this machine that the choice of kernels' paths depends on."""

from __future__ import annotations

import math

import click

from dsc_serve.config import calibration_file
from dsc_serve.machine import default_threads


@click.command(short_help="Measure what the choice of kernels' paths depends on.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Compute threads  [default: all cores].")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
def calibrate_command(threads: int, dtype: str) -> None:
    """Measure this machine's rates, keep them in the user's cache folder, and show what they decide."""
    import torch

    from dsc_kernels.plan import Shape, Sharing, choose, layer_seconds, size
    from dsc_serve.model.calibration import key, measure

    torch.set_num_threads(threads or default_threads())
    kind = getattr(torch, dtype)
    found = measure(kind)
    click.echo(f"{key(kind)}, kept in {calibration_file()}")
    for level in found.gather:
        held = "more" if math.isinf(level.size) else f"up to {size(level.size)}"
        click.echo(f"  gather from {held}: {1e-9 / level.seconds_per_byte:.1f} GB/s")
    click.echo(f"  stream weights: {found.stream / 1e9:.1f} GB/s")
    for name, rate in found.flops.items():
        click.echo(f"  products in {name}: {rate / 1e12:.2f} TFLOP/s")
    click.echo(f"  order a token: {1e9 * found.order_token:.0f} ns, and {1e9 * found.order_pick:.1f} ns per pick")
    sharing = Sharing(0.95, 0.5, 0.5)
    click.echo("for a layer of M, K, d, H and B tokens whose ρ would fall from 0.95 to 0.50:")
    for shape in (
        Shape(1523, 4, 384, 327, kind),
        Shape(65536, 4, 1024, 1024, kind),
        Shape(16384, 32, 4096, 4096, kind),
    ):
        for batch in (16, 512):
            parts = layer_seconds(batch, shape, found, sharing)
            share = parts["composition"] / sum(parts.values())
            choice = choose(batch, shape, found, sharing)
            click.echo(
                f"  {shape.atoms}, {shape.k}, {shape.d}, {shape.hidden}, B {batch}: {choice.path}, {choice.reason}; "
                f"the composition is {share:.0%} of the layer"
            )
