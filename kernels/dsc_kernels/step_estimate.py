"""What a captured step of single tokens should take on a GPU, by arithmetic from stated inputs. Nothing is measured.

Each launch of a layer takes a fixed time and the longer of reading its bytes and computing its products. `floor` is the
same without the fixed time, `before` the same with as many launches as a layer needed when each operator was one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import click

from dsc_kernels.launch_time import (
    BANDWIDTH,
    BFLOAT16,
    FLOPS,
    LAUNCH,
    Launch,
    beside_the_norm,
    found_by_tiles,
    in_a_product,
    scored_beside,
)

BATCHES = (1, 16, 64, 256)
SCREENED_BATCHES = (1, 4, 16, 32)
PROGRAMS, SPAN = 264, 128  # of a launch that scores rows again; columns with one scale
PEAK = 2.84  # of as many normally distributed numbers
STEP_LAUNCHES = 7  # embedding, positions, plan of splits, last sum; norm, product and argmax of the head
FEW_EXPERTS = 16  # that are picked where the norm is computed
LAUNCHES_BEFORE = {"dsc": 27, "molora": 25, "moe": 32, "dense": 24}  # of a layer that turns heads, by operators


@dataclass(frozen=True)
class StepSizes:
    """A decoder in the paper's notation."""

    d: int
    layers: int
    vocabulary: int
    heads: int
    kv: int  # key-value heads
    size: int  # of a head
    atoms: int
    k: int  # atoms per token
    static: int  # width of the static MLP
    experts: int
    experts_used: int  # by a token
    hidden: int  # width of an expert
    dense: int  # width of a dense FFN as large as all of it
    context: int  # tokens of each sequence
    adapters: tuple[int, int, int, int] = (0, 0, 0, 0)  # how many, used, rank, width of the static MLP beside them
    gated: bool = False  # whether experts are

    @property
    def kinds(self) -> list[str]:
        """Those of LAUNCHES_BEFORE that there is an FFN of."""
        has = {"dsc": self.atoms, "molora": self.adapters[0], "moe": self.experts, "dense": self.dense}
        return [kind for kind in LAUNCHES_BEFORE if has[kind]]


MODELS = {
    "paper": StepSizes(384, 6, 50_304, 6, 6, 64, 1523, 4, 327, 5, 2, 545, 2611, 128, (381, 2, 4, 894)),
    "large": StepSizes(4096, 32, 50_304, 32, 8, 128, 16_384, 32, 8192, 4, 2, 8192, 20_480, 1024),
    "64 experts": StepSizes(2048, 16, 50_304, 16, 16, 128, 0, 0, 0, 64, 8, 1024, 0, 1024, gated=True),
}


def distinct(rows: int, picks: float, tokens: int) -> float:
    """Rows that so many tokens pick, each uniformly."""
    return rows * (1 - (1 - picks / rows) ** tokens)


def attention(s: StepSizes, tokens: int) -> list[Launch]:
    projected, out = s.d * (s.heads + 2 * s.kv) * s.size, s.d * s.heads * s.size
    seen = tokens * s.context * s.size
    return [
        Launch("add and norm"),
        Launch("project", projected, tokens * projected),
        Launch("attend", 2 * seen * s.kv, 2 * seen * s.heads),
        Launch("merge"),
        Launch("out", out, tokens * out),
    ]


def ffn(kind: str, s: StepSizes, tokens: int) -> list[Launch]:
    if kind == "moe":
        read = distinct(s.experts, s.experts_used, tokens) * s.hidden * s.d
        products = tokens * s.experts_used * s.hidden * s.d
        ups = 2 if s.gated else 1
        rest = [Launch("up", ups * read, ups * products), Launch("down", read, products)]
        columns = -(-s.hidden // 32) - (-s.d // 32)
        if not found_by_tiles(s.experts, tokens, s.experts_used, columns):
            rest = [Launch("sort"), *rest]
        if s.experts <= FEW_EXPERTS:
            return [Launch("add, norm and pick", s.experts * s.d, tokens * s.experts * s.d), *rest]
        beside = scored_beside(s.experts, s.d, tokens)
        return [*(beside_the_norm if beside else in_a_product)(s.experts, s.d, tokens), *rest]
    routed = {"dsc": (s.atoms, s.k, 1, s.static), "molora": s.adapters}
    rows, picks, rank, width = routed.get(kind, (0, 0, 0, s.dense))
    bank = 2 * distinct(rows, picks, tokens) * rank * s.d if rows else 0
    return [
        Launch("add and norm"),
        Launch("route and raise", (rows + width) * s.d, tokens * (rows + width) * s.d),
        Launch("compose and lower", width * s.d + bank, tokens * (width + 2 * picks * rank) * s.d),
    ]


def scored_again(s: StepSizes) -> float:
    """Rows that a token's bounds leave of a screened router whose rows and inputs are normally distributed.

    All is in deviations of a logit: what int8 leaves out of a row, with what float32 sums may lose, is what a bound
    adds to a logit, and the k-th largest less that is what candidates reach.
    """
    rounding = PEAK / 127 / 12**0.5 + (1.125 * s.d + 64) * 2.0**-22
    kth = NormalDist().inv_cdf(1 - s.k / s.atoms)
    return s.atoms * (1 - NormalDist().cdf(kth - 2 * rounding * s.d**0.5))


def screened_ffn(s: StepSizes, tokens: int) -> list[Launch]:
    """The launches of a DSC layer's FFN whose router is screened in int8, which is half of a number of its own."""
    norm, raised, composed = ffn("dsc", s, tokens)
    router, rows = s.atoms * s.d, scored_again(s)
    saved = router * (1 - 1 / 2 - 1 / SPAN)
    again = tokens * rows * s.d
    return [
        norm,
        Launch("screen and raise", raised.read - saved, raised.products),
        Launch("score again", distinct(s.atoms, rows, tokens) * s.d, again, again, max(again / PROGRAMS, s.d)),
        composed,
    ]


def layer(kind: str, s: StepSizes, tokens: int) -> list[Launch]:
    """The launches of a layer in a step of so many single tokens."""
    return [*attention(s, tokens), *ffn(kind, s, tokens)]


@dataclass(frozen=True)
class StepEstimate:
    """Milliseconds of a step with its head."""

    launches: int
    before_ms: float
    now_ms: float
    floor_ms: float


def estimate(kind: str, s: StepSizes, tokens: int, bandwidth: float, flops: float, launch_s: float) -> StepEstimate:
    head = Launch("head", s.vocabulary * s.d, tokens * s.vocabulary * s.d)
    launches = [*s.layers * layer(kind, s, tokens), head]
    floor = sum(max(one.read * BFLOAT16 / bandwidth, 2 * one.products / flops) for one in launches)
    working = sum(one.seconds(bandwidth, flops) for one in launches)
    now = s.layers * len(layer(kind, s, tokens)) + STEP_LAUNCHES
    before = s.layers * LAUNCHES_BEFORE[kind] + STEP_LAUNCHES
    return StepEstimate(now, 1e3 * (floor + before * launch_s), 1e3 * (working + now * launch_s), 1e3 * floor)


def lines(bandwidth: float, flops: float, launch_s: float) -> Iterator[str]:
    yield f"| model | kind | launches | {' | '.join(map(str, BATCHES))} |"
    yield "|---|---|---|" + "---|" * len(BATCHES)
    for name, sizes in MODELS.items():
        for kind in sizes.kinds:
            found = [estimate(kind, sizes, tokens, bandwidth, flops, launch_s) for tokens in BATCHES]
            cells = (f"{one.before_ms:.2f} → {one.now_ms:.2f} ({one.floor_ms:.3f})" for one in found)
            yield f"| {name} | {kind} | {found[0].launches} | {' | '.join(cells)} |"


def screened_lines(bandwidth: float, flops: float, launch_s: float) -> Iterator[str]:
    """Steps of DSC models with an exact router → with a screened one."""
    yield f"| model | rows scored again | {' | '.join(map(str, SCREENED_BATCHES))} |"
    yield "|---|---|" + "---|" * len(SCREENED_BATCHES)
    for name, sizes in MODELS.items():
        if not sizes.atoms:
            continue
        cells = []
        for tokens in SCREENED_BATCHES:
            exact = estimate("dsc", sizes, tokens, bandwidth, flops, launch_s).now_ms
            both = [ffn("dsc", sizes, tokens), screened_ffn(sizes, tokens)]
            spent = [sum(launch_s + one.seconds(bandwidth, flops) for one in launches) for launches in both]
            cells.append(f"{exact:.3f} → {exact + 1e3 * sizes.layers * (spent[1] - spent[0]):.3f}")
        yield f"| {name} | {scored_again(sizes):.0f} | {' | '.join(cells)} |"


@click.command("steps")
@click.option(
    "--bandwidth-tb", type=click.FloatRange(0, min_open=True), default=BANDWIDTH / 1e12, show_default=True, help="TB/s."
)
@click.option(
    "--tflops", type=click.FloatRange(0, min_open=True), default=FLOPS / 1e12, show_default=True, help="bf16 products."
)
@click.option(
    "--launch-us", type=click.FloatRange(0), default=LAUNCH * 1e6, show_default=True, help="Fixed, of each launch."
)
def steps_command(bandwidth_tb: float, tflops: float, launch_us: float) -> None:
    """Print estimates of a captured decode step: before → now (floor), in milliseconds; then those of DSC models with
    an exact router → with one that is screened in int8. Nothing is measured."""
    rates = bandwidth_tb * 1e12, tflops * 1e12, launch_us * 1e-6
    click.echo("\n".join([*lines(*rates), "", *screened_lines(*rates)]))
