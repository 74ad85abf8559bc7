"""`dsc-serve bench adapters`: what many tenants cost on this machine, and what they cost who is none."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec

from dsc_serve.adapter_choice import CORE_KINDS
from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EMBEDDED_MODEL, EngineConfig, resolve_model
from dsc_serve.output_file import OUTPUT_FILE

KINDS = ("lora", *CORE_KINDS)


@click.command("adapters", context_settings={"show_default": True})
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--rank", type=click.IntRange(1, 256), default=16, help="Of LoRAs and LoRA-XS, which are of all modules.")
@click.option("--shared-rank", type=click.IntRange(1, 256), default=32, help="Of cores on a basis found in adapters.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, help="That are compared.")
@click.option("--loaded", type=click.IntRange(1, 1000), default=100, help="In memory beside streams without any.")
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 8, 32), help="Requests at a time.")
@click.option("--steps", type=click.IntRange(1), default=40, help="Of each system and round.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Of which medians are taken.")
@click.option("--cold", type=click.IntRange(1), default=30, help="Adapters whose first use is timed.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def adapters_command(
    model: str,
    rank: int,
    shared_rank: int,
    kinds: tuple[str, ...],
    loaded: int,
    streams: tuple[int, ...],
    steps: int,
    rounds: int,
    cold: int,
    dtype: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measure MODEL's engine with random adapters, in this process.

    Streams without adapters, in an engine that has many in memory beside one that knows of none, step by step in turn.
    Streams with an adapter each beside streams without, and what they add beside reading the adapters' bytes. How long
    the first token takes when the adapter is on disk. These are of the first --kind. And all kinds beside each other:
    what tenants of each add to a step, and what --loaded of them take in memory.
    """
    resolve_model(model)
    from dsc_serve.bench.step import adapter_kinds, adapters
    from dsc_serve.bench.step.engine_command import machine
    from dsc_serve.engine.preparation import prepare_model

    config = EngineConfig(model=model, threads=threads, dtype=dtype)  # type: ignore[arg-type]  # checked by the option
    prepared = prepare_model(config)
    needed, context = adapters.context_needed(max(streams), steps, rounds), prepared.config.max_position_embeddings
    if needed > context:
        message = f"--steps times --rounds needs a context of {needed} tokens; the model's is {context}"
        raise click.ClickException(message)
    found: dict[str, object] = {"command": as_typed("adapters"), "machine": machine(prepared)}
    kinds = tuple(dict.fromkeys(kinds))
    ranks = {kind: shared_rank if kind == "shared" else rank for kind in kinds}
    count = max(loaded, cold, *streams)
    with TemporaryDirectory() as folder:
        names = {kind: adapter_kinds.write_kind(prepared, Path(folder), kind, count, ranks[kind]) for kind in kinds}
        room = {kind: adapter_kinds.room_for(prepared, kind, count, ranks[kind]) for kind in kinds}
        first, own = names[kinds[0]], msgspec.structs.replace(config, adapters=folder, adapter_bytes=room[kinds[0]])
        beside = [adapters.beside_loaded(prepared, own, first[:loaded], each, steps, rounds) for each in streams]
        click.echo(adapters.format_beside(beside) + "\n")
        tenants = [adapters.many_tenants(prepared, own, first, each, steps, rounds) for each in streams]
        click.echo(adapters.format_tenants(tenants) + "\n")
        start = adapters.cold_start(prepared, own, first[:cold])
        click.echo(adapters.format_cold(start) + "\n")
        all_of_them = msgspec.structs.replace(own, adapter_bytes=sum(room.values()))
        costs = [
            cost
            for each in streams
            for cost in adapter_kinds.compare(prepared, all_of_them, names, ranks, each, steps, rounds)
        ]
        click.echo(adapter_kinds.format_costs(costs) + "\n")
        memory = [
            adapter_kinds.in_memory(prepared, all_of_them, kind, names[kind][:loaded], ranks[kind]) for kind in kinds
        ]
        click.echo(adapter_kinds.format_memory(memory))
    found |= {"beside": beside, "tenants": tenants, "cold": start, "kinds": costs, "memory": memory}
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
