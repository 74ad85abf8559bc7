"""`dsc-serve bench scheduler`: the policies side by side, on a simulated clock."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dsc_serve.bench.machine import as_typed, dated_machine
from dsc_serve.output_file import OUTPUT_FILE


@click.command("scheduler", context_settings={"show_default": True})
@click.option("--policy", "policies", multiple=True, help="Compare this one; may be repeated.  [default: all]")
@click.option("--requests", type=click.IntRange(1), default=10_000, help="Requests to simulate.")
@click.option("--load", type=click.FloatRange(0, min_open=True), default=0.9, help="Arrivals, relative to capacity.")
@click.option("--max-running", type=click.IntRange(1), default=64, help="Most requests in one step.")
@click.option("--step-tokens", type=click.IntRange(1), default=512, help="Most tokens in one step.")
@click.option("--blocks", type=click.IntRange(1), default=2048, help="KV blocks of 16 tokens.")
@click.option("--itl-target-ms", type=click.FloatRange(0), default=0.0, help="As in serve.")
@click.option("--prefix-cache/--no-prefix-cache", default=True, help="As in serve.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the requests.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def scheduler_command(
    policies: tuple[str, ...],
    requests: int,
    load: float,
    max_running: int,
    step_tokens: int,
    blocks: int,
    itl_target_ms: float,
    prefix_cache: bool,
    seed: int,
    json_file: Path | None,
) -> None:
    """Serve the same requests under each policy: the real scheduler, with steps that cost what a model does.

    Also prints what planning and committing a step takes on this machine.
    """
    from dsc_serve.bench.step.scheduler import BLOCK_SIZE, LONGEST, Costs, Workload, compare, format_policies
    from dsc_serve.engine.policies import POLICIES, StepBudget

    for policy in policies:
        if policy not in POLICIES:
            raise click.ClickException(f"--policy {policy} is not known; allowed: {', '.join(POLICIES)}")
    if step_tokens < max_running:
        raise click.ClickException(f"--step-tokens {step_tokens} must be at least --max-running {max_running}")
    if blocks * BLOCK_SIZE < LONGEST:
        raise click.ClickException(f"--blocks {blocks} must be at least {-(-LONGEST // BLOCK_SIZE)}, for one request")
    budget = StepBudget(step_tokens, max_running, itl_target_ms)
    workload = Workload(requests=requests, load=load, seed=seed)
    result = compare(policies or tuple(POLICIES), workload, Costs(), budget, blocks, prefix_cache)
    if json_file is not None:
        found = {"command": as_typed("scheduler"), "machine": dated_machine(), **result}
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    click.echo(format_policies(result))
