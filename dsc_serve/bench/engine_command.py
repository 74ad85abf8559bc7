"""`dsc-serve bench engine`: long prompts beside running requests, and the prefix cache."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from dsc_serve.config import EMBEDDED_MODEL, EngineConfig, resolve_model


@click.command("engine", context_settings={"show_default": True})
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--streams", type=click.IntRange(1), default=16, help="Requests that decode while a long prompt arrives.")
@click.option("--long-prompt", "long_tokens", type=click.IntRange(2), default=900, help="Its tokens.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Long prompts, each beside new streams.")
@click.option("--system-tokens", type=click.IntRange(1), default=512, help="Length of a shared system prompt.")
@click.option("--own-tokens", type=click.IntRange(1), default=32, help="What each request adds to it.")
@click.option("--requests", type=click.IntRange(1), default=20, help="Requests that share it.")
@click.option("--itl-target-ms", type=click.FloatRange(0), default=0.0, help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write them here.")
def engine_command(
    model: str,
    streams: int,
    long_tokens: int,
    rounds: int,
    system_tokens: int,
    own_tokens: int,
    requests: int,
    itl_target_ms: float,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measure MODEL's engine in this process, on random tokens.

    How long running requests wait for their next token while a long prompt is computed, against the steps just before;
    and the time to the first token of requests with a common beginning, without and with the prefix cache.
    """
    resolve_model(model)
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise click.ClickException(f"--json {json_file}: its folder does not exist")
    from dsc_serve.bench.engine import DECODED, Harness, long_prompt, shared_prefix
    from dsc_serve.engine.engine import prepare_model

    config = EngineConfig(
        model=model,
        threads=threads,
        itl_target_ms=itl_target_ms,
        kv_tokens=streams * DECODED + 2 * long_tokens + 2 * (system_tokens + own_tokens + 1),
    )
    loaded = prepare_model(config)
    context = loaded.config.max_position_embeddings
    if max(long_tokens + 2, system_tokens + own_tokens + 1, DECODED) > context:
        raise click.ClickException(f"--long-prompt or --system-tokens is too long: the model's context is {context}")
    cached = Harness(loaded, config)
    without = Harness(loaded, msgspec.structs.replace(config, prefix_cache=False))
    long = long_prompt(without, streams, long_tokens, rounds)
    shared = shared_prefix(without, cached, system_tokens, own_tokens, requests)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode({"long_prompt": long, "shared_prefix": shared})))
    click.echo(
        f"{streams} requests decode: a token every {long.quiet_median_ms:.2f} ms (p99 {long.quiet_p99_ms:.2f})\n"
        f"while a prompt of {long_tokens} tokens is computed: {long.beside_median_ms:.2f} ms (p99 "
        f"{long.beside_p99_ms:.2f}, {long.p99_ratio:.2f} times); its first token after {long.ttft_ms:.0f} ms\n"
        f"{requests} requests share {system_tokens} tokens and add {own_tokens}: first token after "
        f"{shared.ttft_without_ms:.2f} ms without, {shared.ttft_with_ms:.2f} ms with the prefix cache "
        f"(hit rate {shared.hit_rate:.1%})"
    )
