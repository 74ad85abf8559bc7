"""`dsc-serve bench tenants`: steps with as many tenants of one bank as streams, beside other kinds and the base."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec

from dsc_serve.adapter_choice import CORE_KINDS
from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.output_file import OUTPUT_FILE

KINDS = ("lora", *CORE_KINDS)


@click.command("tenants", context_settings={"show_default": True})
@click.argument("model")
@click.option("--atoms", type=click.IntRange(1), default=1024, help="Of the bank, where MODEL has none.")
@click.option("--picks", type=click.IntRange(1, 64), default=4, help="Of these, for each token.")
@click.option("--layers", default="", metavar="LIST", help="Beside which MLPs, as in graft.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, help="Beside the tenants.")
@click.option("--rank", type=click.IntRange(0, 256), default=16, help="Of LoRAs and LoRA-XS; 0: tenants alone.")
@click.option("--shared-rank", type=click.IntRange(1, 256), default=32, help="Of cores on a basis found in adapters.")
@click.option("--loaded", type=click.IntRange(0, 10000), default=1000, help="Tenants in memory together; 0: none.")
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 8, 32), help="Requests at a time.")
@click.option("--steps", type=click.IntRange(1), default=40, help="Of each system and round.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Of which medians are taken.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def tenants_command(
    model: str,
    atoms: int,
    picks: int,
    layers: str,
    kinds: tuple[str, ...],
    rank: int,
    shared_rank: int,
    loaded: int,
    streams: tuple[int, ...],
    steps: int,
    rounds: int,
    dtype: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measure MODEL's engine with random tenants, all different, in this process.

    Systems, whose steps are taken in turn: MODEL as it is, where it has no bank; with a bank and nobody's tenants; with
    a tenant for each stream; and with an adapter of each other --kind for each stream. Before that --loaded tenants are
    in memory together, and each is asked for tokens.
    """
    path = resolve_model(model)
    from dsc_serve.bench.step import adapters, tenant_memory, tenants
    from dsc_serve.bench.step.engine_command import machine
    from dsc_serve.engine.preparation import prepare_model
    from dsc_serve.model.graft import graft
    from dsc_serve.model.tenant import bank_of

    weights = "bfloat16" if path.is_file() else "auto"  # of a GGUF file as `graft` writes them
    config = EngineConfig(model=model, threads=threads, dtype=dtype, weights=weights)  # type: ignore[arg-type]
    prepared = prepare_model(config)
    needed, context = adapters.context_needed(max(streams), steps, rounds), prepared.config.max_position_embeddings
    if needed > context:
        message = f"--steps times --rounds needs a context of {needed} tokens; the model's is {context}"
        raise click.ClickException(message)
    found: dict[str, object] = {"command": as_typed("tenants"), "machine": machine(prepared)}
    with TemporaryDirectory() as folder:
        systems: dict[str, tenants.System] = {}
        banked, own = prepared, config
        if bank_of(prepared.config) is None:
            systems["without a bank"] = prepared, config, [None]
            graft(path, Path(folder) / "model", atoms, picks, layers)
            own = msgspec.structs.replace(config, model=str(Path(folder) / "model"))
            banked = prepare_model(own)
        most, ranks = max(streams), {kind: shared_rank if kind == "shared" else rank for kind in kinds if rank}
        named, room = tenants.folder_of(banked, Path(folder) / "adapters", max(most, loaded), ranks, most)
        own = msgspec.structs.replace(own, adapters=str(Path(folder) / "adapters"), adapter_bytes=max(room, 1 << 20))
        systems["the base"] = banked, own, [None]
        for name, names in named.items():
            systems[name] = banked, own, tenants.choices(names)
        memory = None
        if loaded:  # before the steps, whose memory would be given back meanwhile
            lora = next(iter(named[tenants.TITLES["lora"].format(rank)]), "") if "lora" in ranks else ""
            memory = tenant_memory.tenant_memory(banked, own, named[tenants.TENANTS][:loaded], rank, lora)
            found["memory"] = memory
        rows = [row for count in streams for row in tenants.measure(systems, count, steps, rounds)]
        click.echo(tenants.format_table(rows))
        if memory is not None:
            click.echo("\n" + tenant_memory.format_memory(memory))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode({**found, "steps": rows})))
