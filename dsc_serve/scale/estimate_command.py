"""`dsc-serve scale-model`: the tables of docs/scale.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import click

from dsc_serve.scale.estimate import (
    MODELS,
    Machine,
    Sharding,
    certified,
    dollars_per_million,
    exchanges,
    phases,
    plan,
    prompt_tokens_per_s,
)

GPUS = (1, 8, 64, 1000)
BATCHES = (1, 16, 64, 256)
HIT_RATES = (0.0, 0.5, 0.8)
ABOVE_0 = click.FloatRange(0, min_open=True)
FORMS: tuple[Sharding, ...] = ("rows", "mixed", "columns")


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"{title}:", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def amount(value: float) -> str:
    """Three digits and a power of 1,000."""
    power = max(0, min(4, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".strip()


def kilobytes(value: float) -> str:
    return f"{value / 1e3:,.0f}" if value >= 1e5 else f"{value / 1e3:.3g}"


def sizes() -> Iterable[Sequence[str]]:
    for name, model in MODELS.items():
        parts = (f"{weights * model.layers * model.weight_bytes / 1e9:.3g}" for weights in model.layer.values())
        shape = f"{model.d}, {model.layers}, {model.atoms}, {model.k}, {model.static}, {model.context}"
        yield (name, shape, amount(model.parameters), *parts, f"{model.kv_bytes * model.context / 1e6:.0f}")


def exchanged() -> Iterable[Sequence[str]]:
    model = MODELS["160B"]
    for form in FORMS:
        for tokens in BATCHES:
            sent = exchanges(model, tokens, 8, form)
            cells = (kilobytes(sent.get(name, 0)) for name in ("output", "candidates", "logits", "latents"))
            yield (form, str(tokens), *cells, kilobytes(sum(sent.values()) - sent["attention"]))


def shares(machine: Machine) -> Iterable[Sequence[str]]:
    for name, shards in (("paper", 1), ("large", 1), ("10B", 1), ("160B", 8)):
        for tokens in BATCHES:
            spent = phases(MODELS[name], machine, tokens, shards)
            whole = sum(spent.values())
            halved = sum(phases(certified(MODELS[name]), machine, tokens, shards).values())
            least = f"{halved / whole:.2f}" if shards == 1 else "–"  # what is shared has an exact router
            cells = (f"{seconds / whole:.0%}" for seconds in spent.values())
            yield (f"{name} on {shards}", str(tokens), f"{1e3 * whole:.2f}", *cells, least)


def fleets(machine: Machine, target_s: float, utilisation: float, door_tokens_per_s: float) -> Iterable[Sequence[str]]:
    for name, model in MODELS.items():
        for gpus in GPUS:
            found = plan(model, machine, gpus, target_s)
            if found is None:
                reason = "does not fit" if plan(model, machine, gpus, math.inf) is None else "too slow"
                yield (name, str(gpus), reason, *[""] * 5)
                continue
            cost = dollars_per_million(found.tokens_per_s, found.replicas * found.shards, machine, utilisation)
            doors = math.ceil(found.tokens_per_s * utilisation / door_tokens_per_s)
            yield (
                name,
                str(gpus),
                f"{found.replicas} × {found.shards}",
                str(found.tokens),
                f"{1e3 * found.step_s:.1f}",
                amount(found.tokens_per_s),
                f"{cost:.3g}",
                amount(doors),
            )


def prompts(machine: Machine, utilisation: float) -> Iterable[Sequence[str]]:
    for name, shards in (("large", 1), ("10B", 1), ("160B", 8)):
        rates = [prompt_tokens_per_s(MODELS[name], machine, shards, hits) for hits in HIT_RATES]
        yield (name, *(f"{dollars_per_million(rate, shards, machine, utilisation):.3g}" for rate in rates))


@click.command("scale-model", short_help="What 1 to 1,000 GPUs need and cost, by arithmetic.")
@click.option("--memory-gb", type=ABOVE_0, default=80, show_default=True, help="Of one GPU.")
@click.option("--bandwidth-gb", type=ABOVE_0, default=3350, show_default=True, help="GB/s of its memory.")
@click.option("--tflops", type=ABOVE_0, default=989, show_default=True, help="bf16 products of one GPU.")
@click.option("--reached", type=click.FloatRange(0.01, 1), default=0.6, show_default=True, help="Share of both peaks.")
@click.option("--link-gb", type=ABOVE_0, default=450, show_default=True, help="GB/s to its peers, in one direction.")
@click.option("--link-latency-us", type=click.FloatRange(0), default=8, show_default=True, help="Of one exchange.")
@click.option("--layer-us", type=click.FloatRange(0), default=10, show_default=True, help="Fixed time of one layer.")
@click.option("--price", type=click.FloatRange(0), default=2.5, show_default=True, help="Dollars per GPU and hour.")
@click.option(
    "--utilisation", type=click.FloatRange(0.01, 1), default=0.6, show_default=True, help="Share of the peak."
)
@click.option("--target-ms", type=ABOVE_0, default=50, show_default=True, help="Longest time between tokens.")
@click.option("--door-tokens", type=ABOVE_0, default=2000, show_default=True, help="Tokens a second through one door.")
def scale_model(
    memory_gb: float,
    bandwidth_gb: float,
    tflops: float,
    reached: float,
    link_gb: float,
    link_latency_us: float,
    layer_us: float,
    price: float,
    utilisation: float,
    target_ms: float,
    door_tokens: float,
) -> None:
    """Print the tables of docs/scale.md. All inputs are assumptions; nothing is measured."""
    machine = Machine(
        memory=memory_gb * 1e9,
        bandwidth=bandwidth_gb * 1e9,
        flops=tflops * 1e12,
        reached=reached,
        link=link_gb * 1e9,
        link_latency_s=link_latency_us * 1e-6,
        layer_s=layer_us * 1e-6,
        price_per_hour=price,
    )
    click.echo(
        table(
            "Models, GB of their weights in bfloat16, and the KV cache of one sequence",
            (
                "model",
                "d, L, M, K, H, context",
                "parameters",
                "attention",
                "router",
                "static",
                "bank",
                "KV MB a sequence",
            ),
            sizes(),
        )
    )
    click.echo(
        table(
            "160B on 8 GPUs: kB that each sends for one layer's FFN in one step",
            ("bank", "tokens", "output", "candidates", "logits", "latents", "together"),
            exchanged(),
        )
    )
    names = ("attention", "KV cache", "router", "static", "atoms", "exchange", "fixed", "head")
    click.echo(
        table(
            "Where a decode step's time goes, bank by rows; last: with the certified int8 router, at least, relative",
            ("model on GPUs", "tokens", "ms", *names, "int8"),
            shares(machine),
        )
    )
    click.echo(
        table(
            f"Fleets; tokens by {target_ms:g} ms at the most, dollars per million output tokens at {utilisation:.0%}",
            ("model", "GPUs", "replicas × GPUs", "batch", "step ms", "tokens/s", "$ per million", "doors"),
            fleets(machine, target_ms / 1e3, utilisation, door_tokens),
        )
    )
    click.echo(
        table(
            "Dollars per million prompt tokens, by the share that the prefix cache answers",
            ("model", *(f"{hits:.0%}" for hits in HIT_RATES)),
            prompts(machine, utilisation),
        ),
        nl=False,
    )
