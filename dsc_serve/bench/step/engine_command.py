"""`dsc-serve bench engine`: where a step's time goes; long prompts beside running requests, and the prefix cache."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EMBEDDED_MODEL, ConfigError, EngineConfig, resolve_model
from dsc_serve.output_file import OUTPUT_FILE

if TYPE_CHECKING:
    from dsc_serve.model.decoder import Decoder

PARTS = ("profile", "prompts")


@click.command("engine", context_settings={"show_default": True})
@click.argument("model", default=EMBEDDED_MODEL)
@click.option(
    "--only", type=click.Choice(PARTS), help="Measure only the steps' parts, or only prompts.  [default: both]"
)
@click.option(
    "--running", type=click.IntRange(1), multiple=True, default=(1, 16), help="Requests whose steps are split."
)
@click.option("--steps", type=click.IntRange(1), default=100, help="Steps timed without, and as many with timers.")
@click.option("--streams", type=click.IntRange(1), default=16, help="Requests that decode while a long prompt arrives.")
@click.option("--long-prompt", "long_tokens", type=click.IntRange(2), default=900, help="Its tokens.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Long prompts, each beside new streams.")
@click.option("--system-tokens", type=click.IntRange(1), default=512, help="Length of a shared system prompt.")
@click.option("--own-tokens", type=click.IntRange(1), default=32, help="What each request adds to it.")
@click.option("--requests", type=click.IntRange(1), default=20, help="Requests that share it.")
@click.option("--itl-target-ms", type=click.FloatRange(0), default=0.0, help="As in serve.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="As in serve.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def engine_command(
    model: str,
    only: str | None,
    running: tuple[int, ...],
    steps: int,
    device: str,
    dtype: str,
    threads: int,
    json_file: Path | None,
    **prompts: Any,
) -> None:
    """Measure MODEL's engine in this process, on random tokens.

    Where the time of steps of single tokens goes, greedy and sampled, beside what their bytes and FLOPs take at least
    on this machine. How long running requests wait for their next token while a long prompt is computed, against the
    steps just before; and the time to the first token of requests with a common beginning, without and with the prefix
    cache. On a CUDA device a step's parts are its captured graph and its head, by the device's clock, and the host.
    """
    resolve_model(model)
    from dsc_serve.engine.preparation import prepare_model

    config = EngineConfig(model=model, threads=threads, dtype=dtype, device=device)  # type: ignore[arg-type]  # checked
    try:
        loaded = prepare_model(config)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    found: dict[str, object] = {"command": as_typed("engine"), "machine": machine(loaded)}
    if only != "prompts":
        parts = profile_steps if device == "cpu" else profile_device
        found["profiles"] = parts(loaded, config, running, steps)
    if only != "profile":
        found |= measure_prompts(loaded, config, **prompts)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))


def machine(model: Decoder) -> dict[str, object]:
    """What measures, said and returned."""
    import torch

    from dsc_serve.bench.machine import describe_machine, load_average
    from dsc_serve.model.description import kernels

    found = {
        **describe_machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "kernels": kernels(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_average": load_average(),
    }
    click.echo(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items()) + "\n")
    return found


def profile_steps(model: Decoder, config: EngineConfig, running: tuple[int, ...], steps: int) -> object:
    from dsc_serve.bench.step.profile import SAMPLINGS, context_needed, format_profiles, profile
    from dsc_serve.text.tokenizer import Tokenizer

    needed, context = context_needed(steps), model.config.max_position_embeddings
    if needed > context:
        raise click.ClickException(f"--steps {steps} needs a context of {needed} tokens; the model's is {context}")
    tokenizer = Tokenizer.load(resolve_model(config.model))
    found = []
    for count in running:
        room = msgspec.structs.replace(
            config, kv_tokens=count * (needed + config.block_size), max_running=max(count, config.max_running)
        )
        room = msgspec.structs.replace(room, step_tokens=max(room.step_tokens, room.max_running))
        found += [profile(model, room, tokenizer, count, sampling, steps) for sampling in SAMPLINGS]
    click.echo(format_profiles(found))
    return found


def profile_device(model: Decoder, config: EngineConfig, running: tuple[int, ...], steps: int) -> object:
    from dsc_serve.bench.layer.timing import EventClock
    from dsc_serve.bench.step.device_steps import NotCapturedError, device_steps, format_device_steps

    try:
        found = device_steps(model, config, running, steps, EventClock())
    except NotCapturedError as error:
        raise click.ClickException(str(error)) from None
    click.echo(format_device_steps(found))
    return found


def measure_prompts(
    model: Decoder,
    config: EngineConfig,
    *,
    streams: int,
    long_tokens: int,
    rounds: int,
    system_tokens: int,
    own_tokens: int,
    requests: int,
    itl_target_ms: float,
) -> dict[str, object]:
    from dsc_serve.bench.step.harness import DECODED, Harness, format_prompts, long_prompt, shared_prefix

    context = model.config.max_position_embeddings
    if max(long_tokens + 2, system_tokens + own_tokens + 1, DECODED) > context:
        raise click.ClickException(f"--long-prompt or --system-tokens is too long: the model's context is {context}")
    room = streams * DECODED + 2 * long_tokens + 2 * (system_tokens + own_tokens + 1)
    config = msgspec.structs.replace(config, kv_tokens=room, itl_target_ms=itl_target_ms)
    cached = Harness(model, config)
    without = Harness(model, msgspec.structs.replace(config, prefix_cache=False))
    long = long_prompt(without, streams, long_tokens, rounds)
    shared = shared_prefix(without, cached, system_tokens, own_tokens, requests)
    click.echo(format_prompts(long, shared))
    return {"long_prompt": long, "shared_prefix": shared}
