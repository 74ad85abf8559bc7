"""The `dsc-serve` command: parses, calls, prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dsc_serve import __version__
from dsc_serve.config import DTYPES, EMBEDDED_MODEL, EngineConfig, ServerConfig, resolve_model

F = TypeVar("F", bound=Callable[..., Any])

DTYPE = click.Choice(list(DTYPES))
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


class Command(click.Group):
    """Turns the package's own errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            if type(error).__module__.partition(".")[0] != "dsc_serve":
                raise
            raise click.ClickException(str(error)) from None
        except (OSError, MemoryError) as error:
            raise click.ClickException(str(error) or "out of memory") from None
        except RuntimeError as error:
            if "alloc" not in str(error):  # how torch says that it is out of memory
                raise
            raise click.ClickException(f"out of memory: {str(error).splitlines()[0]}") from None


def engine_options(command: F) -> F:
    """The options that every command with an engine takes."""
    defaults = EngineConfig()
    options = (
        click.option("--dtype", type=DTYPE, default=defaults.dtype, show_default=True, help="Compute in this dtype."),
        click.option(
            "--device", type=click.Choice(["cpu", "cuda"]), default=defaults.device, show_default=True, help="Run here."
        ),
        click.option(
            "--threads", type=click.IntRange(0), default=defaults.threads, help="Compute threads [default: all cores]."
        ),
        click.option(
            "--max-running",
            type=click.IntRange(1),
            default=defaults.max_running,
            show_default=True,
            help="Most requests in one step.",
        ),
        click.option(
            "--step-tokens",
            type=click.IntRange(1),
            default=defaults.step_tokens,
            show_default=True,
            help="Most tokens computed in one step; longer prompts take several.",
        ),
        click.option(
            "--block-size",
            type=click.IntRange(1),
            default=defaults.block_size,
            show_default=True,
            help="Tokens in one KV block.",
        ),
        click.option(
            "--kv-tokens",
            type=click.IntRange(0),
            default=defaults.kv_tokens,
            help="Tokens the KV pool holds [default: full contexts for all, within a fifth of free memory].",
        ),
        click.option(
            "--kernels",
            default=defaults.kernels,
            show_default=True,
            help="CPU kernels: auto, plain (torch alone), or an instruction set such as avx2.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def engine_config(model: str, options: dict[str, Any]) -> EngineConfig:
    options["dtype"] = DTYPES[options["dtype"]]
    return EngineConfig(model=model, **options)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Serve language models with Dynamic Subspace Composition (DSC) feed-forward layers."""


@main.command(short_help="Serve a model over an OpenAI-compatible HTTP API.")
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free port.")
@click.option("--served-model-name", default="", help="The model's name in the API [default: its folder's].")
@click.option(
    "--max-waiting", type=click.IntRange(1), default=1024, show_default=True, help="Requests that may queue; then 429."
)
@engine_options
def serve(model: str, host: str, port: int, served_model_name: str, max_waiting: int, **options: Any) -> None:
    """Serve MODEL, a checkpoint folder or the embedded model's name, over an OpenAI-compatible HTTP API."""
    from dsc_serve.server.app import serve as serve_http
    from dsc_serve.worker.supervisor import EngineStartError

    resolve_model(model)
    try:
        serve_http(
            ServerConfig(
                host=host,
                port=port,
                served_model_name=served_model_name,
                max_waiting=max_waiting,
                engine=engine_config(model, options),
            )
        )
    except (EngineStartError, OSError) as error:
        raise click.ClickException(str(error)) from None


@main.command(short_help="Continue a text.")
@click.argument("prompt")
@click.option("--model", default=EMBEDDED_MODEL, show_default=True, help="Checkpoint folder or embedded model's name.")
@click.option("--max-tokens", type=click.IntRange(0), default=100, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", type=float, default=0.95, show_default=True)
@click.option("--top-k", type=int, default=0, help="Only the k most likely tokens [default: all].")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Repeatable sampling.")
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@engine_options
def generate(
    prompt: str,
    model: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Continue PROMPT (a text, or token ids such as "5,17,2" for a model without a tokenizer) and print the result."""
    from dsc_serve.llm import LLM
    from dsc_serve.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    options["dtype"] = DTYPES[options["dtype"]]
    with LLM(model, **options) as llm:
        if llm.tokenizer is None:
            try:
                ids = [int(part) for part in prompt.replace(",", " ").split()]
            except ValueError:
                raise click.ClickException(f"{model} has no tokenizer: give token ids, such as 5,17,2") from None
            for new in llm.stream(ids, params):
                click.echo(" ".join(map(str, new.token_ids)), nl=False)
                click.echo(" ", nl=False)
        else:
            stream = llm.stream(prompt, params)  # a prompt that cannot be used ends here, before anything is printed
            click.echo(prompt, nl=False)
            for new in stream:
                click.echo(new.text, nl=False)
    click.echo()


@main.command(short_help="Describe a model.")
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="Load in this dtype.")
@click.option("--kernels", default="auto", show_default=True, help="As in serve.")
def inspect(model: str, dtype: str, kernels: str) -> None:
    """Describe MODEL: architecture, parameters, bank, certificate, and the kernels that would serve it here."""
    from dsc_serve.engine.engine import prepare_model
    from dsc_serve.model.description import describe
    from dsc_serve.text.tokenizer import Tokenizer

    folder = resolve_model(model)
    rows = describe(prepare_model(EngineConfig(model=model, dtype=DTYPES[dtype], kernels=kernels)))
    tokenizer = Tokenizer.load(folder)
    rows["tokenizer"] = "none: token ids only" if tokenizer is None else f"{tokenizer.vocab_size} tokens"
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


@main.command("import-reference", short_help="Convert a checkpoint of the paper's script.")
@click.option("--weights", type=FILE, required=True, help="The script's state dict as safetensors.")
@click.option("--config", "config_file", type=FILE, required=True, help="The script's config as JSON.")
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
def import_reference(weights: Path, config_file: Path, out: Path) -> None:
    """Convert a checkpoint of the paper's reference script (dsc, standard_moe or dense) to the serving form."""
    from dsc_serve.model.reference import import_reference as convert

    config = convert(weights, config_file, out)
    click.echo(f"{out}: {config.ffn.kind}, {config.num_hidden_layers} layers of width {config.hidden_size}")


@main.command(short_help="Write a model of random weights.")
@click.option("--ffn", type=click.Choice(["dsc", "moe", "molora", "dense"]), required=True, help="FFN kind.")
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
@click.option("--preset", type=click.Choice(["paper", "large"]), default="paper", show_default=True)
@click.option("--context", type=click.IntRange(1), default=None, help="Positions [default: the preset's].")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Any field of config.json, e.g. ffn.num_atoms=512."
)
def init(
    ffn: str, out: Path, preset: str, context: int | None, dtype: str, seed: int, changes: tuple[str, ...]
) -> None:
    """Write a model of random weights without a tokenizer: a preset's sizes, changed by any number of --set.

    \b
    Presets (sizes by the paper's budget solver):
      paper   35 M parameters, 28 M active: vocabulary 50,304, d 384, 6 layers
      large   400 M parameters, 250 M active: vocabulary 50,304, d 1024, 24 layers
    """
    import torch

    from dsc_serve.model.checkpoint import save_checkpoint
    from dsc_serve.model.decoder import parameter_counts, tensor_shapes
    from dsc_serve.model.initial import changed_config, initial_tensors, preset_config

    config = changed_config(preset_config(preset, ffn, context), changes)
    tensors = {}
    count = len(tensor_shapes(config))
    stream = initial_tensors(config, seed, getattr(torch, dtype))
    with click.progressbar(
        stream, length=count, label="tensors", hidden=not sys.stderr.isatty(), file=sys.stderr
    ) as bar:
        for name, tensor in bar:
            tensors[name] = tensor
    save_checkpoint(config, tensors, out)
    total, active = parameter_counts(config)
    click.echo(f"{out}: {ffn}, {total:,} parameters, {active:,} active per token")


@main.group(short_help="Measure a server, or the layers on this machine.")
def bench() -> None:
    """Measure a server, or the layers on this machine."""


@main.group()
def kernels() -> None:
    """Look at the kernels themselves."""


def _attach_commands() -> None:
    from dsc_kernels.aot import aot_command
    from dsc_serve.bench.command import serve_command
    from dsc_serve.bench.layer_command import layer_command

    bench.add_command(serve_command, "serve")
    bench.add_command(layer_command, "layer")
    kernels.add_command(aot_command, "aot")


_attach_commands()

if __name__ == "__main__":
    main()
