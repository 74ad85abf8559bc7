"""What all kept results say together: a row for each pair of systems, a line for each page, DSC beside MoE in full."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.elements import figure
from dsc_serve.bench.compare.findings import answer, counted, verdict
from dsc_serve.bench.compare.results import Ratio, Results, is_compared, load_results

SUFFIX = ".results.json"
MOST_TOKENS = "output_throughput"
LLAMA_CPP = "llama.cpp"
KEPT_PAIR = "quantised-q4_1"  # steps of the package's own file: a row where the servers were not compared on it
NOT_YET = "Not measured yet."


@dataclass(frozen=True)
class ComparedPair:
    """Two systems of a comparison, by their names there, and what they are for who has not read it."""

    source: str
    here: str
    there: str
    here_is: str
    there_is: str


PAIRS = (
    ComparedPair("large-cpu", "dsc int8", "moe", "DSC, 400 M", "our own MoE, as large"),
    ComparedPair("paper", "dsc int8", "moe", "DSC, 35 M", "our own MoE, as large"),
    ComparedPair("mixture-olmoe", "dsc equal total", "moe", "DSC of equal total", "a mixture of OLMoE's shape"),
    ComparedPair("vllm", "moe", "vllm", "our own MoE, 35 M", "vLLM for CPUs, a Mixtral"),
    ComparedPair("smollm2", "dsc-serve", "vllm", "SmolLM2-135M", "vLLM for CPUs"),
    ComparedPair("smollm2", "dsc-serve gguf", LLAMA_CPP, "SmolLM2-135M, its Q4_1 file", "llama.cpp, the same file"),
    ComparedPair("adapters", "dsc-serve adapters", "vllm adapters", "SmolLM2-135M, eight adapters", "vLLM for CPUs"),
)
SIZES = {  # comparisons in which DSC stands beside MoE in this engine, and what they are
    "paper": "35 M parameters",
    "large-cpu": "400 M parameters",
    "mixture-olmoe": "OLMoE's shape",
    "mixture-granite": "Granite-3.1-1B-A400M's shape",
    "mixture-qwen": "Qwen1.5-MoE's shape",
}
PRESETS = {"paper": "35 M", "large": "400 M", "olmoe": "OLMoE's", "granite": "Granite's", "qwen": "Qwen1.5-MoE's"}


def overview(name: str, folder: Path, into: Path, only: Sequence[str] | None = None) -> str:
    """The text of one of OVERVIEWS. folder: of pages and their results; into: the document that has links to them;
    only: these results. Raises ComparisonError where the folder has none."""
    raws = {file.name.removesuffix(SUFFIX): file for file in sorted(folder.glob(f"*{SUFFIX}"))}
    if not raws:
        raise ComparisonError(f"{folder} has no results; `dsc-serve bench report RUN --into PAGE` keeps them")
    kept = {source: file for source, file in raws.items() if only is None or source in only}
    link = os.path.relpath(folder.resolve(), into.resolve().parent)
    return OVERVIEWS[name](kept, "" if link == "." else f"{link}/")


def summary(raws: Mapping[str, Path], link: str) -> str:
    """One row for each pair: tokens per second of both, and the ratio's medians, bold where all rounds agree."""
    rows, machines, told = list[str](), dict[str, list[str]](), list[ComparedPair]()
    compared = {source: load_results(file) for source, file in raws.items() if is_compared(file)}
    for pair in PAIRS:
        if (found := compared.get(pair.source)) and {pair.here, pair.there} <= set(found.measured()):
            told.append(pair)
            rows.append(summary_row(pair, found, link))
            machines.setdefault(told_machine(found.machine), []).append(pair.source)
    beside_llama = any(LLAMA_CPP in pair.there for pair in told)
    steps = [] if beside_llama or KEPT_PAIR not in raws else llama_steps(raws[KEPT_PAIR])
    if steps:
        rows.append(quantised_row(KEPT_PAIR, steps, link))
        machines.setdefault(told_machine(kept_machine(raws[KEPT_PAIR])), []).append(KEPT_PAIR)
    if not rows:
        return NOT_YET
    head = ["| here | there | here, tokens/s | there, tokens/s | ratio |", "|---" * 5 + "|"]
    where = "; ".join(f"{', '.join(dict.fromkeys(sources))}: {machine}" for machine, sources in machines.items())
    return "\n".join([*head, *rows, "", f"Measured on: {where}."])


def summary_row(pair: ComparedPair, found: Results, link: str) -> str:
    points = found.points("closed")
    rates = [
        ", ".join(figure(found.median(name, "closed", value, MOST_TOKENS)) for value in points)
        for name in (pair.here, pair.there)
    ]
    cells = ", ".join(told_ratio(found.ratio(pair.here, pair.there, "closed", value, MOST_TOKENS)) for value in points)
    here = f"{pair.here_is}{other_streams(points)}"
    return f"| {here} | {pair.there_is} | {rates[0]} | {rates[1]} | [{cells}]({link}{pair.source}.md) |"


def told_ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    agreed = verdict(ratio, True) in ("better", "worse")
    return f"**{ratio.median:.2f}**" if agreed else f"{ratio.median:.2f}"


def other_streams(points: Sequence[float]) -> str:
    """Says at how many streams, where these are not the usual ones."""
    return "" if tuple(points) == (1, 8, 16, 32) else f" ({', '.join(f'{point:g}' for point in points)} streams)"


def llama_steps(file: Path) -> list[dict[str, Any]]:
    """Steps by form of weights, where `bench quantised --llama-cpp` kept them."""
    try:
        steps: object = msgspec.json.decode(file.read_bytes(), type=dict[str, Any]).get("steps")
    except msgspec.DecodeError:
        return []
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return []
    return steps if any(step.get("system") == LLAMA_CPP for step in steps) else []


def kept_machine(file: Path) -> Mapping[str, Any]:
    return dict(msgspec.json.decode(file.read_bytes(), type=dict[str, Any])["machine"])


def quantised_row(source: str, steps: Sequence[Mapping[str, Any]], link: str) -> str:
    """Of steps alone, whose rounds are not kept: no ratio is bold."""
    ours, theirs = ([step for step in steps if step["system"] == name] for name in ("stored", LLAMA_CPP))
    rates = [", ".join(f"{step['tokens_per_s']:.1f}" for step in own) for own in (ours, theirs)]
    cells = ", ".join(f"{1 / step['peer_ratio']:.2f}" for step in ours)
    here = f"SmolLM2-135M, its Q4_1 file, steps alone{other_streams([step['streams'] for step in ours])}"
    return f"| {here} | llama.cpp, the same file | {rates[0]} | {rates[1]} | [{cells}]({link}{source}.md) |"


def told_machine(machine: Mapping[str, Any]) -> str:
    return f"{machine.get('cpu', 'an unknown processor')}, {machine.get('threads', '?')} threads"


def answers(raws: Mapping[str, Path], link: str) -> str:
    """A line for each page: its title, and where it is a comparison what its first screen says."""
    return "\n".join(f"- {line}" for source, file in raws.items() for line in [page_line(source, file, link)])


def page_line(source: str, file: Path, link: str) -> str:
    page = file.with_name(f"{source}.md")
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    title = next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), source)
    found = f" {answer(load_results(file))[0]}" if is_compared(file) else drafted_line(file)
    return f"[{title}]({link}{source}.md).{found}"


def drafted_line(file: Path) -> str:
    """What the first screen of a comparison of speculation says of DSC and MoE; nothing of other files."""
    from dsc_serve.bench.compare.elements import Paragraph
    from dsc_serve.bench.compare.speculation import found, page

    if not found.is_kept_in(file):
        return ""
    told = [element.text for element in page.elements(found.load(file)) if isinstance(element, Paragraph)]
    return f" {told[0]}" if told else ""


def dsc_beside_moe(raws: Mapping[str, Path], link: str) -> str:
    """Tokens per second of DSC to those of MoE, every round, at every size and router, without and with drafts."""
    parts = [
        "Tokens per second of DSC, times those of the mixture of experts beside it; the median, and in brackets each "
        "round. Bold: all rounds agree, and the median is more than 2 % from 1."
    ]
    for source, what in SIZES.items():
        if source in raws and is_compared(raws[source]):
            parts += ratio_table(f"[{what}]({link}{source}.md)", load_results(raws[source]))
    for source, file in raws.items():
        parts += drafted_tables(source, file, link)
    return "\n\n".join(parts) if len(parts) > 1 else NOT_YET


def ratio_table(title: str, found: Results) -> list[str]:
    points, baseline = found.points("closed"), str(found.comparison["baseline"])
    rounds = int(found.comparison["rounds"])
    asked = {system["name"]: system for system in found.comparison["system"]}
    lines = [f"| | {' | '.join(counted(value, 'stream') for value in points)} |", "|---" * (len(points) + 1) + "|"]
    for name in found.measured():
        if asked[name].get("ffn") != "dsc" or baseline not in found.measured():
            continue
        router = (asked[name].get("settings") or {}).get("router_precision", "auto")
        cells = [
            all_rounds(found.ratios(name, baseline, "closed", value, MOST_TOKENS).values(), rounds) for value in points
        ]
        lines.append(f"| {found.label(name)}, router {router} | {' | '.join(cells)} |")
    date = f"{found.date[:10]}, {told_machine(found.machine)}"
    return [f"### {title}", "\n".join(lines), f"{date}."] if len(lines) > 2 else []


def drafted_tables(source: str, file: Path, link: str) -> Iterator[str]:
    from dsc_serve.bench.compare.speculation import found

    if not found.is_kept_in(file):
        return
    results = found.load(file)
    rows = [(row.preset, row.rate) for row in results.drafted if row.system == "dsc"]
    for preset in dict.fromkeys(preset for preset, _ in rows):
        streams = sorted({row.streams for row in results.drafted if row.preset == preset})
        lines = [f"| | {' | '.join(counted(count, 'stream') for count in streams)} |"]
        lines.append("|---" * (len(streams) + 1) + "|")
        for rate in dict.fromkeys(rate for own, rate in rows if own == preset):
            cells = [
                all_rounds(results.ratios(preset, count, ("dsc", rate), ("moe", rate)).values(), results.asked.rounds)
                for count in streams
            ]
            name = "no drafts" if rate is None else f"drafts right {rate:g} of the time"
            lines.append(f"| {name} | {' | '.join(cells)} |")
        size = PRESETS.get(preset, preset)
        yield f"### [Steps of the engine alone, without and with drafts, {size}]({link}{source}.md)"
        yield "\n".join(lines)
        yield f"{results.date[:10]}, {told_machine(results.machine)}."


def all_rounds(ratios: Iterable[float], asked: int) -> str:
    """The median and each round of a ratio; and how many rounds there are, where they are fewer than others have."""
    values = list(ratios)
    if not values:
        return "–"
    ratio = Ratio.of(values)
    fewer = f"; {counted(len(values), 'round')} of {asked}" if len(values) < asked else ""
    return f"{told_ratio(ratio)} ({', '.join(f'{value:.2f}' for value in values)}{fewer})"


OVERVIEWS: dict[str, Callable[[Mapping[str, Path], str], str]] = {
    "summary": summary,
    "answers": answers,
    "dsc-moe": dsc_beside_moe,
}
