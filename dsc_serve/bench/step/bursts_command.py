"""`dsc-serve bench bursts`: what policies make of prompts that come at once."""

from __future__ import annotations

from pathlib import Path

import click

from dsc_serve.bench.layer.command import numbers
from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EMBEDDED_MODEL, EngineConfig
from dsc_serve.output_file import OUTPUT_FILE


@click.command("bursts", context_settings={"show_default": True})
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--policy", "policies", multiple=True, default=("fcfs", "bursts"), help="Each against the first.")
@click.option("--burst", "bursts", callback=numbers, metavar="LIST", default="8,32", help="Prompts that come at once.")
@click.option("--beside", callback=numbers, metavar="LIST", default="0,4", help="Requests that decode meanwhile.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=48, help="Length of each prompt.")
@click.option("--output-tokens", type=click.IntRange(2), default=64, help="Tokens to generate for each request.")
@click.option("--apart-ms", type=click.FloatRange(0), default=0.2, help="Between prompts of a burst.")
@click.option("--waves", type=click.IntRange(1), default=3, help="Bursts of a round.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Of all policies in turn.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--seed", default=0, help="Seed of the prompts.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write every round's figures to this file.")
def bursts_command(
    model: str,
    policies: tuple[str, ...],
    bursts: tuple[int, ...],
    beside: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int,
    apart_ms: float,
    waves: int,
    rounds: int,
    threads: int,
    seed: int,
    json_file: Path | None,
) -> None:
    """Let prompts come to MODEL at once, under several policies, in one process and in turn.

    Each burst comes when the last has been answered, once to an engine that is idle and once beside requests that
    decode. Latencies are inside the engine. A ratio whose rounds lie on both sides of 1 is no difference.
    """
    import msgspec

    from dsc_serve.bench.step.bursts import SETTLED, BurstBench, format_bursts, run_bursts
    from dsc_serve.bench.step.engine_command import machine
    from dsc_serve.engine.policies import POLICIES
    from dsc_serve.engine.preparation import prepare_model

    for policy in policies:
        if policy not in POLICIES:
            raise click.ClickException(f"--policy {policy} is not known; allowed: {', '.join(POLICIES)}")
    if len(set(policies)) < len(policies):
        raise click.ClickException(f"--policy is {', '.join(policies)}; each may be there once")
    for option, values, least in (("--burst", bursts, 1), ("--beside", beside, 0)):
        if min(values) < least:
            raise click.ClickException(f"{option} is {min(values)}; it must be at least {least}")
    bench = BurstBench(
        policies=policies,
        bursts=bursts,
        beside=beside,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        apart_ms=apart_ms,
        waves=waves,
        rounds=rounds,
        seed=seed,
    )
    config = EngineConfig(model=model, threads=threads)
    prepared = prepare_model(config)
    needed = prompt_tokens + output_tokens + max(bursts) + SETTLED
    if needed > prepared.config.max_position_embeddings:
        raise click.ClickException(
            f"{model} has a context of {prepared.config.max_position_embeddings} tokens; prompts of {prompt_tokens}, "
            f"answers of {output_tokens} and bursts of {max(bursts)} need {needed}"
        )
    found: dict[str, object] = {"command": as_typed("bursts"), "machine": machine(prepared)}
    rows = run_bursts(prepared, config, bench, lambda line: click.echo(line, err=True))
    click.echo(format_bursts(rows, bench))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode({**found, "bench": bench, "rows": rows})))
