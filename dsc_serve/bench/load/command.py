"""`dsc-serve bench serve`: the load generator on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import click
import msgspec

from dsc_serve.bench.load.arrivals import ARRIVALS
from dsc_serve.bench.load.exchange import RequestOutcome
from dsc_serve.bench.load.generator import LoadConfig, LoadError, run_load
from dsc_serve.bench.load.overload import format_overload, run_overload
from dsc_serve.bench.load.summary import format_table, record_line
from dsc_serve.bench.machine import as_typed, dated_machine
from dsc_serve.config import ConfigError
from dsc_serve.output_file import OUTPUT_FILE
from dsc_serve.text.tokenizer import TokenizerError


@click.command("serve", context_settings={"show_default": True})
@click.argument("url")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Model to ask for; of several, such as a server's adapters, requests name one after the other."
    "  [default: the first that the server lists]",
)
@click.option("--arrivals", type=click.Choice(sorted(ARRIVALS)), default="closed", help="Load profile.")
@click.option("--concurrency", default=8, help="Streams, each of which sends when its last has ended; size of bursts.")
@click.option("--request-rate", default=1.0, help="Requests per second, for open profiles such as poisson.")
@click.option("--burstiness", default=1.0, help="Of gamma arrivals: 1 is Poisson's, less comes in bursts.")
@click.option("--end-rate", type=float, help="Requests per second at the end of a ramp, after --duration.")
@click.option("--max-in-flight", type=int, help="Requests of open profiles sent at once; the others wait here.")
@click.option("--requests", default=200, help="Requests to measure, at most.")
@click.option("--duration", "duration_s", default=120.0, help="Seconds after which no further request starts.")
@click.option("--warmup", type=int, help="Requests sent before and not measured.  [default: one per stream]")
@click.option("--timeout", "timeout_s", default=120.0, help="Seconds after which a request counts as failed.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False),
    help="Text to cut prompts from.  [default: prompts are random token ids]",
)
@click.option(
    "--sharegpt",
    type=click.Path(exists=True, dir_okay=False),
    help="Conversations as JSON of the ShareGPT form; their first questions are prompts.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of the tokenizer that counts the tokens of these files.  [default: words are counted]",
)
@click.option("--vocab-size", default=256, help="Random token ids are below this number.")
@click.option(
    "--prompt-tokens",
    metavar="LENGTHS",
    help="Length of prompts, in tokens (or words, see --tokenizer): "
    "N, uniform:LOW:HIGH, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA.  [default: 64, or whole questions]",
)
@click.option(
    "--output-tokens",
    metavar="LENGTHS",
    help="Tokens to generate, likewise.  [default: 64, or as many as the answers of --sharegpt]",
)
@click.option("--prefix-tokens", default=0, help="Length of a beginning that prompts share.")
@click.option("--prefixes", default=1, help="Different beginnings.")
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, help="Generate all output tokens, even past the end of text."
)
@click.option("--temperature", default=0.0, help="Sampling temperature; 0 takes the most likely token.")
@click.option(
    "--goodput",
    multiple=True,
    metavar="NAME:MS",
    help="Limit that a request must keep to count as good: ttft:100, tpot:20 or e2el:2000; several may be given.",
)
@click.option("--seed", default=0, help="Seed of the prompts, the arrivals and the sampling.")
@click.option("--api-key", default="", show_default=False, help="Sent as a bearer token; never written to the result.")
@click.option("--records", type=OUTPUT_FILE, help="Also write every request to this file, as JSONL.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write the result to this file.")
def serve_command(url: str, json_file: Path | None, records: Path | None, **settings: object) -> None:
    """Measure the server at URL under load.

    Streams completions from it and prints throughput and latencies as a client sees them. Ends with status 1 when no
    request succeeded.
    """
    outcomes: list[RequestOutcome] = []
    try:
        # options have the names of LoadConfig's fields
        result = run_load(LoadConfig(url=url, **settings), outcomes.append)  # type: ignore[arg-type]
    except (ConfigError, TokenizerError, LoadError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(format_table(result))
    if records is not None:
        outcomes.sort(key=lambda outcome: outcome.due)
        records.write_bytes(b"".join(record_line(outcome, outcomes[0].due) for outcome in outcomes))
    if json_file is not None:
        text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    if not result.completed:
        raise SystemExit(1)


@click.command("overload", context_settings={"show_default": True})
@click.argument("url")
@click.option("--factor", default=10.0, help="Load, as a multiple of what the server completes at its peak.")
@click.option("--duration", "duration_s", default=20.0, help="Seconds of each load.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Of the three loads; medians are told.")
@click.option("--concurrency", default=64, help="Streams at which the server is at its peak: its max_running.")
@click.option("--places", "slots", default=128, help="Generations that it holds: max_running and max_waiting.")
@click.option("--prompt-tokens", default=64, help="Length of each prompt.")
@click.option("--output-tokens", default=256, help="Tokens to generate for each request.")
@click.option("--api-key", default="", show_default=False, help="Sent as a bearer token; never written to the result.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Also write every round to this file.")
def overload_command(
    url: str,
    factor: float,
    duration_s: float,
    rounds: int,
    concurrency: int,
    slots: int,
    prompt_tokens: int,
    output_tokens: int,
    api_key: str,
    json_file: Path | None,
) -> None:
    """Offer the server at URL more than it can do, and print what it still does.

    Its peak is measured first, by a closed loop of --concurrency streams; then a full house, by as many streams as it
    has places; then Poisson arrivals at --factor times the rate that it completed at its peak.
    """
    load = LoadConfig(
        url=url,
        concurrency=concurrency,
        requests=10**9,
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        api_key=api_key,
    )
    found: dict[str, object] = {"command": as_typed("overload"), "machine": dated_machine(), "factor": factor}
    try:
        measured = run_overload(load, slots, factor, rounds, lambda line: click.echo(line, err=True))
    except (ConfigError, LoadError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(format_overload(measured, factor))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode({**found, "rounds": measured})))
