"""`dsc-serve bench quantised`: what a model's weights in few bits are worth on this machine, and beside llama.cpp."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click
import msgspec

from dsc_serve.bench.machine import as_typed
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.output_file import OUTPUT_FILE, TEXT_FILE

FORMS = ("stored", "bfloat16", "int8", "int4")


@click.command("quantised", context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "--weights", "forms", type=click.Choice(FORMS), multiple=True, default=("bfloat16", "stored"),
    help="As in serve; ratios are to the first.",
)  # fmt: skip
@click.option(
    "--activations", "inputs", type=click.Choice(["int16", "int8"]), multiple=True, default=("int16",),
    help="As in serve, of each form that is quantised.",
)  # fmt: skip
@click.option("--llama-cpp", is_flag=True, help="MODEL, a GGUF file, in llama.cpp too: pip install llama-cpp-python.")
@click.option("--text", type=TEXT_FILE, help="Also its bits per byte, and its logits beside float32's.")
@click.option("--text-tokens", type=click.IntRange(2), default=4096, help="Of the text, from its beginning.")
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 8, 16), help="Requests at a time.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=1000, help="Of the prompts whose time is measured.")
@click.option("--steps", type=click.IntRange(1), default=20, help="Of each system and round.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Of which medians are taken.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="As in serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As in serve, for llama.cpp as well.")
@click.option("--kernels", default="auto", help="As in serve, such as avx512bf16 where there are tiles, too.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write them here.")
def quantised_command(
    model: str,
    forms: tuple[str, ...],
    inputs: tuple[str, ...],
    llama_cpp: bool,
    text: Path | None,
    text_tokens: int,
    streams: tuple[int, ...],
    prompt_tokens: int,
    steps: int,
    rounds: int,
    dtype: str,
    threads: int,
    kernels: str,
    json_file: Path | None,
) -> None:
    """Measure MODEL with its weights held in several forms, step by step and prompt by prompt in turn.

    Steps of streams that decode greedily, beside reading the weights' bytes once; of llama.cpp, which runs in a process
    of its own, one llama_decode with a token of each sequence, without choosing the next. And a prompt's time to its
    first token.
    """
    resolve_model(model)
    from dsc_serve.bench.step import quality, quantised
    from dsc_serve.bench.step.engine_command import machine
    from dsc_serve.bench.step.llama_peer import Peer, PeerError
    from dsc_serve.bench.step.streams import needed_tokens
    from dsc_serve.engine.preparation import prepare_model
    from dsc_serve.machine import default_threads

    systems = []
    for form in dict.fromkeys(forms):
        for activations in dict.fromkeys(("int16",) if form == "bfloat16" else inputs):  # none of it is quantised
            chosen = {"dtype": dtype, "weights": form, "activations": activations, "kernels": kernels}
            config = EngineConfig(model=model, threads=threads, **chosen)  # type: ignore[arg-type]
            name = form if activations == "int16" else f"{form}, {activations} activations"
            systems.append(quantised.HeldForm(name, prepare_model(config), config))
    context = systems[0].model.config.max_position_embeddings
    needed = max(prompt_tokens + 1, needed_tokens(quantised.PROMPT_TOKENS, max(streams), steps * rounds))
    if needed > context:
        message = f"--steps, --rounds and --prompt-tokens need {needed} tokens; the context of {model} is {context}"
        raise click.ClickException(message)
    found: dict[str, object] = {
        "command": as_typed("quantised"),
        "machine": machine(systems[0].model),
        "bytes": {system.name: system.nbytes for system in systems},
    }
    costs = []
    if text is not None:
        try:
            named = [(system.name, system.config) for system in systems]
            costs = quality.quality(named, text.read_text("utf-8"), text_tokens)
        except (OSError, UnicodeError, quality.TextError) as error:
            raise click.ClickException(f"--text: {error}") from error
    with ExitStack() as stack:
        peer = None
        try:
            if llama_cpp:
                own = Peer(resolve_model(model), max(streams), needed, threads or default_threads())
                peer = stack.enter_context(own)
            rows = [row for each in streams for row in quantised.decode(systems, peer, each, steps, rounds)]
            prompts = quantised.prompts(systems, peer, prompt_tokens, rounds)
        except PeerError as error:
            raise click.ClickException(str(error)) from error
    for system in systems:
        click.echo(f"{system.name}: {system.nbytes / 1e6:.1f} MB of weights")
    tables = quantised.format_tokens(rows), quantised.format_steps(rows), quantised.format_prompts(prompts)
    click.echo("\n" + "\n\n".join(tables))
    if costs:
        click.echo("\n" + quality.format_quality(costs))
    if json_file is not None:
        found |= {"steps": rows, "prompts": prompts, "quality": costs}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
