"""The `dsc-serve` command: parses, calls, prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from dsc_serve import __version__
from dsc_serve.command_options import ServeCommand, engine_options, given, options_of
from dsc_serve.config import DTYPES, EMBEDDED_MODEL, EngineConfig, environment, resolve_model
from dsc_serve.panics import PanicError, panics_as_errors
from dsc_serve.settings import SECTIONS, choose, document

F = TypeVar("F", bound=Callable[..., Any])

DTYPE = click.Choice(list(DTYPES))
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


class Command(click.Group):
    """Turns the package's own errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with panics_as_errors():
                return super().invoke(ctx)
        except PanicError as error:
            raise click.ClickException(str(error)) from None
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


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Serve language models with Dynamic Subspace Composition (DSC) feed-forward layers."""


@main.command(cls=ServeCommand, short_help="Serve a model over an OpenAI-compatible HTTP API.")
@click.argument("folder", metavar="[MODEL]", required=False)
@click.option("--config", "config_file", type=FILE, help="TOML file of settings; docs/configuration.md lists them.")
@click.option("--print-config", is_flag=True, help="Print the settings that hold, with their sources, and exit.")
@options_of(*SECTIONS)
def serve(folder: str | None, config_file: Path | None, print_config: bool, **options: Any) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API: a folder of this server's or of Hugging Face's form, a GGUF file,
    or the embedded model's name."""
    from dsc_serve.server.process import serve as serve_http
    from dsc_serve.worker.supervisor import EngineStartError

    if folder is not None:
        if options["model"] is not None:
            raise click.UsageError(f"MODEL is {folder!r} and --model is {options['model']!r}; give one of the two")
        options["model"] = folder
    chosen = choose(config_file, environment(), options)
    config = chosen.config()
    if print_config:
        click.echo(chosen.toml(), nl=False)
        return
    resolve_model(config.engine.model)
    try:
        serve_http(config)
    except (EngineStartError, OSError) as error:
        raise click.ClickException(str(error)) from None


@main.command("serve-ray", short_help="Serve replicas behind one endpoint on this machine, with Ray Serve.")
@click.argument("file", type=FILE)
def serve_ray(file: Path) -> None:
    """Serve what FILE, a Ray Serve config such as deploy/ray/serve.yaml, says. SIGHUP reads it again and updates."""
    try:
        from dsc_serve.scale.local import LocalStartError, run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; pip install 'dsc-serve[ray]'") from None
    try:
        run(file)
    except LocalStartError as error:
        raise click.ClickException(str(error)) from None


@main.command(short_help="List every setting of `serve`.")
def settings() -> None:
    """Print every setting of `serve`, in Markdown: its flag, default, allowed values and meaning."""
    click.echo(document(), nl=False)


@main.command(short_help="List every metric of `serve`.")
def metrics() -> None:
    """Print every metric of /metrics, in Markdown: its type, labels and meaning."""
    from dsc_serve.server.metrics.document import document as metrics_document

    click.echo(metrics_document(), nl=False)


@main.command(short_help="Make an API key.")
@click.argument("name")
def key(name: str) -> None:
    """Make an API key for NAME: the key itself on standard error, its entry for `key_file` on standard output."""
    from dsc_serve.server.keys import new_key

    made, entry = new_key(name)
    click.echo(f"{made}   is the key; it is kept nowhere", err=True)
    click.echo(entry, nl=False)


@main.command(short_help="Continue a text.")
@click.argument("prompt")
@click.option("--model", default=EMBEDDED_MODEL, show_default=True, help="As in serve.")
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
    with LLM(model, **given(options)) as llm:
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
@click.option("--weights", default="auto", show_default=True, help="As in serve.")
@click.option("--keep", default="", help="As in serve.")
@click.option("--kernels", default="auto", show_default=True, help="As in serve.")
def inspect(model: str, dtype: Any, weights: Any, keep: str, kernels: str) -> None:
    """Describe MODEL: architecture, parameters, bank, certificate, and the kernels that would serve it here."""
    from dsc_serve.engine.preparation import prepare_model
    from dsc_serve.model.description import describe
    from dsc_serve.text.tokenizer import Tokenizer

    folder = resolve_model(model)
    config = EngineConfig(model=model, dtype=dtype, weights=weights, keep=keep, kernels=kernels)
    rows = describe(prepare_model(config))
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


@main.command("import-hf", short_help="Convert a Hugging Face checkpoint.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
def import_hf(folder: Path, out: Path) -> None:
    """Convert FOLDER (config.json, safetensors, tokenizer.json) of a family in docs/models.md."""
    from dsc_serve.model.huggingface import import_huggingface

    _report_import(import_huggingface(folder, out), out)


@main.command("import-gguf", short_help="Convert a GGUF file.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
def import_gguf(file: Path, out: Path, dtype: str) -> None:
    """Convert FILE of a family in docs/models.md: weights dequantised once, tokenizer and chat template with them."""
    import torch

    from dsc_serve.model.gguf import import_gguf as convert

    _report_import(convert(file, out, getattr(torch, dtype)), out)


def _report_import(config: Any, out: Path) -> None:
    from dsc_serve.text.broken_template import BrokenTemplate
    from dsc_serve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(out)
    text = "no tokenizer.json: it works with token ids only"
    if tokenizer is not None:
        template = "no" if tokenizer.chat_template is None else "a"
        if isinstance(tokenizer.chat_template, BrokenTemplate):
            template = "a broken"
        text = f"tokenizer of {tokenizer.vocab_size} tokens, {template} chat template"
    click.echo(f"{out}: {config.num_hidden_layers} layers of width {config.hidden_size}; {text}")


@main.command(short_help="Write a model of random weights.")
@click.option("--ffn", type=click.Choice(["dsc", "moe", "molora", "dense"]), required=True, help="FFN kind.")
@click.option("--out", type=FOLDER, required=True, help="Checkpoint folder to write.")
@click.option(
    "--preset",
    type=click.Choice(["paper", "large", "olmoe", "granite", "qwen"]),
    default="paper",
    show_default=True,
    help="Sizes.",
)
@click.option(
    "--equal",
    type=click.Choice(["total", "active"]),
    default=None,
    help="Which parameters of a DSC are as many as those of the mixture that the preset is.",
)
@click.option("--context", type=click.IntRange(1), default=None, help="Positions [default: the preset's].")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--balanced", is_flag=True, help="Routers prefer nothing for all tokens, as load losses see to.")
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Any field of config.json, e.g. ffn.num_atoms=512."
)
def init(
    ffn: str,
    out: Path,
    preset: str,
    equal: Literal["total", "active"] | None,
    context: int | None,
    dtype: str,
    seed: int,
    balanced: bool,
    changes: tuple[str, ...],
) -> None:
    """Write a model of random weights without a tokenizer: a preset's sizes, changed by any number of --set.

    \b
    Presets (sizes by the paper's budget solver):
      paper   35 M parameters, 28 M active: vocabulary 50,304, d 384, 6 layers
      large   400 M parameters, 250 M active: vocabulary 50,304, d 1024, 24 layers
    Presets of the shapes of mixtures that people run, about 0.7 billion parameters each (--ffn moe or dsc):
      olmoe   64 experts, 8 picked
      granite 32 experts, 8 picked
      qwen    60 experts, 4 picked, and a shared one
    """
    import torch

    from dsc_serve.model.checkpoint import save_checkpoint
    from dsc_serve.model.decoder import parameter_counts, tensor_shapes
    from dsc_serve.model.initial import changed_config, initial_tensors, preset_config
    from dsc_serve.train.balance import balanced_routers

    if balanced and ffn == "dense":
        raise click.ClickException("--balanced: --ffn dense has no router; expected one of dsc, moe, molora")
    try:
        config = preset_config(preset, ffn, context, equal)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    config = changed_config(config, changes)
    tensors = {}
    count = len(tensor_shapes(config))
    stream = initial_tensors(config, seed, getattr(torch, dtype))
    with click.progressbar(
        stream, length=count, label="tensors", hidden=not sys.stderr.isatty(), file=sys.stderr
    ) as bar:
        for name, tensor in bar:
            tensors[name] = tensor
    if balanced:
        tensors |= balanced_routers(config, tensors, seed)
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
    from dsc_kernels.step_estimate import steps_command
    from dsc_serve.bench.compare.command import (
        compare_command,
        peer_adapters_command,
        peer_model_command,
    )
    from dsc_serve.bench.compare.report_command import report_command
    from dsc_serve.bench.decide.decide_command import decide_command
    from dsc_serve.bench.layer.calibrate_command import calibrate_command
    from dsc_serve.bench.layer.command import layer_command
    from dsc_serve.bench.load.command import overload_command, serve_command
    from dsc_serve.bench.step.adapters_command import adapters_command
    from dsc_serve.bench.step.batching_command import batching_command
    from dsc_serve.bench.step.bursts_command import bursts_command
    from dsc_serve.bench.step.context_command import context_command
    from dsc_serve.bench.step.engine_command import engine_command
    from dsc_serve.bench.step.forward_command import forward_command
    from dsc_serve.bench.step.quantised_command import quantised_command
    from dsc_serve.bench.step.scheduler_command import scheduler_command
    from dsc_serve.bench.step.speculation_command import speculation_command
    from dsc_serve.bench.step.tenants_command import tenants_command
    from dsc_serve.scale.estimate_command import scale_model
    from dsc_serve.train import command as training
    from dsc_serve.train.adapter_command import adapt_command, adapter_group
    from dsc_serve.train.graft_command import graft_command
    from dsc_serve.train.quantise.command import quantize_command

    bench.add_command(serve_command, "serve")
    bench.add_command(overload_command, "overload")
    bench.add_command(compare_command, "compare")
    bench.add_command(report_command, "report")
    bench.add_command(peer_model_command, "peer-model")
    bench.add_command(peer_adapters_command, "peer-adapters")
    bench.add_command(forward_command, "forward")
    bench.add_command(layer_command, "layer")
    bench.add_command(engine_command, "engine")
    bench.add_command(scheduler_command, "scheduler")
    bench.add_command(batching_command, "batching")
    bench.add_command(speculation_command, "speculation")
    bench.add_command(quantised_command, "quantised")
    bench.add_command(adapters_command, "adapters")
    bench.add_command(tenants_command, "tenants")
    bench.add_command(bursts_command, "bursts")
    bench.add_command(context_command, "context")
    bench.add_command(decide_command, "decide")
    kernels.add_command(aot_command, "aot")
    kernels.add_command(steps_command, "steps")
    kernels.add_command(calibrate_command, "calibrate")
    main.add_command(scale_model)
    main.add_command(adapter_group)
    main.add_command(adapt_command)
    main.add_command(graft_command)
    main.add_command(training.train_command, "train")
    main.add_command(training.evaluate_command, "evaluate")
    main.add_command(training.prune_command, "prune")
    main.add_command(training.merge_experts_command, "merge-experts")
    main.add_command(quantize_command, "quantize")
    main.add_command(training.study_command, "study")


_attach_commands()

if __name__ == "__main__":
    main()
