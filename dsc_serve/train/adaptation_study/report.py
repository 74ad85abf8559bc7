"""The results of a study of adapters as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dsc_serve.train.adaptation_study.findings import change, findings, own_bits, percent
from dsc_serve.train.checkpoint import write_whole
from dsc_serve.train.settings import TrainError

BEGIN, END = "<!-- adaptation: begin -->", "<!-- adaptation: end -->"


def report(result: Mapping[str, Any]) -> str:
    """Markdown of what results.json holds."""
    options, texts = result["options"], list(result["texts"])
    held = [own["held_out_tokens"] for own in result["texts"].values()]
    lines = [
        f"`{result['command']}`, {result['date']}, dsc-serve {result['version']}, {result['machine']}, "
        f"{result['threads']} threads: {result['base']['name']}, {len(texts)} texts, {options['tokens']:,} training "
        f"tokens each; measured on {min(held):,} to {max(held):,} held-out tokens of each, in windows of "
        f"{options['length']}.",
        "",
    ]
    if result["missing"]:
        lines += [f"**Not finished**: {', '.join(result['missing'])}. The same command goes on.", ""]
    lines += ["### What was found", "", *(f"- {line}" for line in findings(result)), ""]
    if result["base_bits"]:
        lines += ["### By kind", "", *summary(result, texts), ""]
    if result["equal_bytes"]:
        lines += ["### At equal bytes a tenant", "", *beside(result, texts), ""]
    if "certificates" in result and {"lora", "shared"} <= result["kinds"].keys():
        lines += ["### Before and after a shared basis", "", *before_and_after(result, texts), ""]
    if "refusal" in result:
        lines += [f"Of unaligned adapters `adapter share` says: {result['refusal']['said'] or 'nothing'}", ""]
    for name, kind in result["kinds"].items():
        if name != "mixed":
            lines += [f"### Held-out bits per byte: {kind['title']}", "", *matrix(result, kind, texts), ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def summary(result: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    head = ["kind", "bits/byte, own text, mean", "against the base", "against the LoRA of all texts", "bytes a tenant"]
    head += ["shared bytes", "trained tokens", "training, s"]
    base = [result["base_bits"][text] for text in texts]
    mixed = own_bits(result["kinds"]["mixed"], texts) if "mixed" in result["kinds"] else None
    rows = [["the base", f"{mean(base):.3f}", *[""] * 6]]
    for name, kind in result["kinds"].items():
        own = own_bits(kind, texts)
        row = [kind["title"], f"{mean(own):.3f}", percent(change(own, base))]
        row += ["" if mixed is None or name == "mixed" else percent(change(own, mixed))]
        row += [f"{kind[field]:,}" for field in ("tenant_bytes", "shared_bytes", "tokens")]
        rows.append([*row, f"{kind['training_seconds']:,.0f}"])
    yield from table(head, rows)


def beside(result: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    head = ["kind", "bytes a tenant", "LoRA", "its bytes", "times as many", "bits/byte", "the LoRA's", "change"]
    rows = []
    for name, other in result["equal_bytes"].items():
        kind, lora = result["kinds"][name], result["kinds"][other]
        own, theirs = own_bits(kind, texts), own_bits(lora, texts)
        row = [kind["title"], f"{kind['tenant_bytes']:,}", lora["title"], f"{lora['tenant_bytes']:,}"]
        row += [f"{lora['tenant_bytes'] / kind['tenant_bytes']:.2f}", f"{mean(own):.3f}", f"{mean(theirs):.3f}"]
        rows.append([*row, percent(change(own, theirs))])
    yield from table(head, rows)


def before_and_after(result: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    head = ["text", "left out, median", "at most", "‖ΔW − ΔŴ‖₂ at most", "base", "LoRA", "on the basis"]
    rows = []
    lora, shared = result["kinds"]["lora"]["bits"], result["kinds"]["shared"]["bits"]
    for text in texts:
        told = result["certificates"][text]
        row = [text, f"{100 * told['median_share']:.1f} %", f"{100 * told['largest_share']:.1f} %"]
        row += [f"{told['largest_error']:.3f}", f"{result['base_bits'][text]:.3f}"]
        rows.append([*row, f"{lora[text][text]:.3f}", f"{shared[text][text]:.3f}"])
    yield from table(head, rows)


def matrix(result: Mapping[str, Any], kind: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    """Rows are adapters, columns texts; the base stands above, the adapter of all texts below."""
    rows = [["the base", *(f"{result['base_bits'][text]:.3f}" for text in texts)]]
    for name, bits in kind["bits"].items():
        cells = [f"{bits[text]:.3f}" for text in texts]
        rows.append([name, *(f"**{cell}**" if text == name else cell for text, cell in zip(texts, cells, strict=True))])
    if "mixed" in result["kinds"]:
        mixed = result["kinds"]["mixed"]["bits"]["mixed"]
        rows.append(["all texts together", *(f"{mixed[text]:.3f}" for text in texts)])
    yield from table(["adapter of", *texts], rows)


def check_document(file: Path) -> None:
    """Raises TrainError for a file that there is without the lines between which results stand."""
    if file.exists():
        text = file.read_text("utf8")
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
            raise TrainError(
                f"{file}: results stand between the lines {BEGIN!r} and {END!r}, which it has not once each"
            )


def write_into(file: Path, text: str) -> None:
    """Between the two lines of a document, or in a new file that has them."""
    block = f"{BEGIN}\n{text.strip()}\n{END}"
    if not file.exists():
        write_whole(file, f"{block}\n")
        return
    before, _, rest = file.read_text("utf8").partition(BEGIN)
    write_whole(file, before + block + rest.partition(END)[2])
